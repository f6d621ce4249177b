"""Chat templates: `rendering` finds what the target produces and chooses a template, `families` holds those by name."""
