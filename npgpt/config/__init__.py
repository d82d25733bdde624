"""What may be asked for: settings with their names, types, ranges and help. No arrays, no files, no printing."""
