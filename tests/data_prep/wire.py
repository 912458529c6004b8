"""SGLang's own processing of chat requests, in this process and without a server: `python wire.py FOLDER PARSER OPTIONS`.

FOLDER has a tokenizer and its chat template. Every line of the input is the body of a request; every line of the output the token ids
of its prompt, or `{"refused": why}`.
"""

import json
import sys
from types import SimpleNamespace

from sglang.srt.entrypoints.openai import serving_chat
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.parser.template_manager import TemplateManager
from transformers import AutoTokenizer


class Unset:
    """Settings of a server that were left at their default."""

    def __init__(self, **given):
        self.__dict__.update(given)

    def __getattr__(self, name):
        return None


def serving(folder, parser, options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = Unset(default_chat_template_kwargs=options)
    serving_chat.get_serving = serving_chat.get_model = lambda: settings
    hf_config = SimpleNamespace(model_type="any", architectures=["Any"])
    manager = SimpleNamespace(
        tokenizer=tokenizer, processor=None, server_args=Unset(), served_model_name="m",
        config_value={"tool_call_parser": parser}.get,
        model_config=SimpleNamespace(get_default_sampling_params=dict, hf_config=hf_config, is_multimodal=False),
    )  # fmt: skip
    template = TemplateManager()
    template.load_chat_template(manager, None, folder)
    return serving_chat.OpenAIServingChat(manager, template)


def main(folder, parser, options):
    server = serving(folder, parser, json.loads(options))
    for line in sys.stdin:
        try:
            found = server._process_messages(ChatCompletionRequest(**json.loads(line)), False).prompt_ids
        except ValueError as error:
            found = {"refused": str(error)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
