"""Raw file formats: one file a format."""
