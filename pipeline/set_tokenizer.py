"""The tokenizer of a shard set, for decoding its codes or making them again: the one that made them, or none."""

from __future__ import annotations

from pipeline.ledger import Manifest
from pipeline.storage import ArtifactError
from tokenization.config import TokenizerConfig
from tokenization.tokenizer import Tokenizer


def load_set_tokenizer(manifest: Manifest, config: TokenizerConfig, *, doing: str) -> Tokenizer:
    """Return the tokenizer of a config, if it is the one that made a set's codes.

    Args:
        manifest: of the set.
        config: the manifest's own, or that of the set's spec, whose weights may have moved since.
        doing: what it is for, with the set's name, for the message.

    Raises:
        ArtifactError: it is another one by now.
    """
    tokenizer = Tokenizer.load(config)
    if tokenizer.fingerprint != manifest.fingerprint:
        raise ArtifactError(
            f"{doing}: its codes were made with tokenizer {manifest.fingerprint.digest}, got "
            f"{tokenizer.fingerprint.digest} from {config.weights!r}; put the old weights back"
        )
    return tokenizer
