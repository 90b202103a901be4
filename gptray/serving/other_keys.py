"""Keys of OpenAI's and vLLM's requests that this server lacks: aliases, ignored, refused ones."""

from __future__ import annotations

from collections import abc

from gptray.config.suggest import did_you_mean, nearest

# Other names that people try, and the key they mean.
ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "max_length": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "eos_token_id": "stop_token_ids",
    "prompt_token_ids": "prompt",
    "messages": "prompt",
    "prompt": "messages",
    "input": "prompt",
    "inputs": "prompt",
    "top_logprobs": "logprobs",
}
# Ignored whatever their value,
_IGNORED = (
    "user", "store", "metadata", "service_tier", "safety_identifier", "prediction", "cache_salt",
    "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "parallel_tool_calls",
    "request_id", "include_reasoning", "spaces_between_special_tokens",
)  # fmt: skip
# or only with these values, which ask for nothing.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "detokenize": (True,),
    "suffix": ("",),
    "best_of": (1,),
    "echo": (False,),
    "add_special_tokens": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "bad_words": ([],),
    "logits_processors": ([],),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
_TEXT = "this model reads and writes text"
_TEMPLATE = "chat_template_kwargs sets variables of the model's own template"
_FREE = "nothing restricts what the model writes; ask for the format in the prompt"
_BIAS = "logit_bias makes tokens likelier or bans them"
_BEAMS = "there is no beam search; temperature=0 takes the likeliest token"
_TOOLS = "describe the tools in a message"
# What to do instead of sending a key that is refused.
_INSTEAD = {
    "detokenize": "an answer has its text; return_token_ids=true adds the ids",
    "suffix": "the model continues the prompt and sees nothing after it",
    "best_of": "n gives several answers",
    "echo": "POST /v1/completions echoes a prompt",
    "add_special_tokens": "the template writes the special tokens",
    "use_beam_search": _BEAMS,
    "length_penalty": _BEAMS,
    "early_stopping": _BEAMS,
    "bad_words": _BIAS,
    "logits_processors": _BIAS,
    "allowed_token_ids": _BIAS,
    "priority": "requests run in the order in which they arrive",
    "response_format": _FREE,
    "structured_outputs": _FREE,
    "guided_json": _FREE,
    "guided_regex": _FREE,
    "guided_choice": _FREE,
    "guided_grammar": _FREE,
    "tools": _TOOLS,
    "tool_choice": _TOOLS,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "web_search_options": "put what the model is to know into a message",
    "documents": "put what the model is to know into a message",
    "modalities": _TEXT,
    "audio": _TEXT,
    "media_io_kwargs": _TEXT,
    "mm_processor_kwargs": _TEXT,
    "chat_template": _TEMPLATE,
    "reasoning_effort": _TEMPLATE,
    "thinking_token_budget": "max_completion_tokens limits the whole answer",
    "verbosity": "max_completion_tokens limits an answer",
    "moderation": "check the texts yourself",
    "repetition_detection": "repetition_penalty and frequency_penalty make a model repeat less",
    "prompt_logprobs": "POST /v1/completions with echo=true and logprobs scores a prompt",
    "prompt_embeds": "prompt takes text or token ids",
    "kv_transfer_params": "a server keeps its cache to itself",
    "vllm_xargs": "vLLM's plugins do not run here",
}


def complaint_about(key: str, value: object, keys: abc.Collection[str]) -> str | None:
    """What is wrong with a key that is not one of a request's `keys`; None if it is ignored."""
    if key in _IGNORED or value in _HARMLESS.get(key, ()):
        return None
    if key in _INSTEAD:
        return f"{key} is not supported: {_INSTEAD[key]}"
    near = ALIASES.get(key) or nearest(key, keys)
    return f"unknown key {key[:60]!r}{did_you_mean(near if near in keys else None)}"
