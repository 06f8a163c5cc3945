"""SemAlign-MS-Subjects200K in its released layout."""
