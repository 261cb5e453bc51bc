"""A checkpoint's folder, by its path or its name on the hub."""

from __future__ import annotations

from pathlib import Path


def resolve(model: str | Path) -> Path:
    """The folder of a checkpoint: a folder as it is, `org/name` by the hub or from its cache.

    huggingface_hub honours HF_HUB_OFFLINE; only weights, configuration and tokenizer are fetched,
    and no code of a repository is ever run.
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
            # Not *.safetensors: some repositories hold the weights twice, as consolidated.* too.
            "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
            "special_tokens_map.json", "chat_template.jinja"]))
    except Exception as e:       # the hub has many ways to fail; each says itself what it was
        reason = " ".join(str(e).split())[:300]
        raise FileNotFoundError(f"{model} is no folder here, and the hub says: {reason}") from None
