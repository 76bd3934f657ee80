"""A page in the browser: photos, free words, similarity of a caption's phrases, example boxes.

Python's own HTTP server and a page of plain HTML and JavaScript: nothing is installed for it, and nothing is fetched
from or sent to other hosts.
"""
