"""Scripts that `export` puts beside what it writes; they import nothing of this package."""
