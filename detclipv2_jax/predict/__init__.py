"""Words and examples found in folders of photos and videos, and written as labels that other tools read."""
