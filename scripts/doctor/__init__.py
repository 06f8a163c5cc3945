"""What looks over a data set; the command is scripts/doctor.py."""
