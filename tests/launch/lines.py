"""A job that says a line ten times a second, for twelve seconds."""

import time

if __name__ == "__main__":
    for number in range(120):
        print("line", number, flush=True)
        time.sleep(0.1)
