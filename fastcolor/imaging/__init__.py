"""Image files, with all that they carry."""
