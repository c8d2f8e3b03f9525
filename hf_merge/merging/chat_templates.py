"""Chat templates: the common formats, a model's own, and the one that most models share."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from hf_merge.checkpoints.checkpoint import Checkpoint

_LOOP = "{%- for message in messages -%}"
_END = "{%- endfor -%}"
_PROMPT = "{%%- if add_generation_prompt -%%}{{ %s }}{%%- endif -%%}"
_BOS = "{{- bos_token if bos_token is defined and bos_token else '' -}}"
_EOS = "(eos_token if eos_token is defined and eos_token else '')"

BUILTIN: Mapping[str, str] = {
    "alpaca": _BOS
    + _LOOP
    + "{%- if message.role == 'user' -%}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
    + "{%- elif message.role == 'assistant' -%}{{ '### Response:\\n' + message.content + "
    + _EOS
    + " + '\\n\\n' }}"
    + "{%- else -%}{{ message.content + '\\n\\n' }}{%- endif -%}"
    + _END
    + _PROMPT % "'### Response:\\n'",
    "chatml": _LOOP
    + "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    + _END
    + _PROMPT % "'<|im_start|>assistant\\n'",
    "exaone": _LOOP
    + "{%- if loop.first and message.role != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}"
    + "{{ '[|' + message.role + '|]' + message.content + ('\\n' if message.role == 'user' else '[|endofturn|]\\n') }}"
    + _END
    + _PROMPT % "'[|assistant|]'",
    "llama3": _BOS
    + _LOOP
    + "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
    + _END
    + _PROMPT % "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
    "mistral": _BOS
    + "{%- set pending = namespace(system='') -%}"
    + _LOOP
    + "{%- if message.role == 'system' -%}{%- set pending.system = message.content + '\\n\\n' -%}"
    + "{%- elif message.role == 'user' -%}{{ '[INST] ' + pending.system + message.content + ' [/INST]' }}"
    + "{%- set pending.system = '' -%}"
    + "{%- else -%}{{ ' ' + message.content + "
    + _EOS
    + " }}{%- endif -%}"
    + _END,
}
"""Jinja texts by name."""

TOKENS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""What a format writes that should be tokens of the vocabulary."""

Template = str | list[Any]
"""A Jinja text, or the list of named ones that a tokenizer_config.json may hold."""


def template_of(checkpoint: Checkpoint) -> Template | None:
    """A model's chat template; None if it has none."""
    text = checkpoint.bytes("chat_template.jinja")
    if text is not None:
        return text.decode("utf-8", "replace")
    for file in ("tokenizer_config.json", "chat_template.json"):
        found = (checkpoint.json(file) or {}).get("chat_template")
        if isinstance(found, str | list) and found:
            return found
    return None


def most_common(templates: Sequence[Template | None]) -> Template | None:
    """The template that most models have, of several the first; None if there are none. Who has none has no vote."""
    votes = Counter(str(template) for template in templates if template is not None)
    return max((t for t in templates if t is not None), key=lambda template: votes[str(template)], default=None)
