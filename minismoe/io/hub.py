"""The folder of a checkpoint, from a path or from a name on Hugging Face's hub."""

from pathlib import Path


def resolve(model: str | Path) -> Path:
    """The folder `model` itself, or else the cached copy of hub name `org/name`, fetched if needed.

    Only weights, configuration, tokenizer and licence are fetched; no code ever runs.
    huggingface_hub honours HF_HUB_OFFLINE. Raises FileNotFoundError if there is no such model, and
    ModuleNotFoundError if huggingface_hub is not installed.
    """
    if Path(model).is_dir():
        return Path(model)
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such model folder: {model}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModuleNotFoundError(
            f"{model} is no folder here; to fetch it: pip install 'minismoe[hub]'") from None
    try:
        return Path(snapshot_download(str(model), allow_patterns=[
            # Not *.safetensors: some repositories hold a second copy, consolidated.safetensors.
            "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "special_tokens_map.json", "chat_template.jinja", "LICENSE*", "NOTICE*", "*POLICY*"]))
    except Exception as e:       # the hub's client raises many types of error
        reason = " ".join(str(e).split())[:300]
        raise FileNotFoundError(f"{model} is no folder here, and the hub says: {reason}") from None
