"""Prints the words it was called with, as JSON."""

import json
import sys

if __name__ == "__main__":
    print(json.dumps(sys.argv[1:]))
