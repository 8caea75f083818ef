"""Libraries signed by the Intel SGX SDK."""

from softsgx.image.sdk.metadata import Block, choose_block
from softsgx.image.sdk.reader import block_plan, read_sdk, sdk_blocks, sdk_is_laid_out
from softsgx.image.sdk.writer import (
    BlockSpec,
    SdkLayout,
    blocks_for,
    embed_sigstruct,
    lay_out_sdk,
    write_blocks,
)

__all__ = [
    "Block",
    "BlockSpec",
    "SdkLayout",
    "block_plan",
    "blocks_for",
    "choose_block",
    "embed_sigstruct",
    "lay_out_sdk",
    "read_sdk",
    "sdk_blocks",
    "sdk_is_laid_out",
    "write_blocks",
]
