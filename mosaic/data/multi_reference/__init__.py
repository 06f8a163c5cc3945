"""Our format (preprocess/FORMAT.md): its manifest, its reader and its writer."""
