"""What SGLang's own parser makes of command lines: a list of them on standard input as JSON, each after `-m sglang.launch_server`; of
each comes a line, `ARGS` and the arguments named here as JSON: `python -m tests.launch.serving.parse_args NAME ...`."""

import argparse
import json
import sys

from sglang.srt.server_args import ServerArgs

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    for words in json.load(sys.stdin):
        known = vars(parser.parse_args(words))
        print("ARGS", json.dumps({name: str(known[name]) for name in sys.argv[1:]}))
