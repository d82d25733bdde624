"""What a user may ask for: settings with names, types, ranges and help texts. No arrays, no files, no printing."""
