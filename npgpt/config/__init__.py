"""What a user may ask for: fields (how a setting is declared and checked) and settings (the list). No arrays, no files."""
