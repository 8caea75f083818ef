"""Libraries signed by the Intel SGX SDK."""

from softsgx.image.sdk.config import SdkConfig, read_sdk_config
from softsgx.image.sdk.metadata import Block, Elrange, choose_block
from softsgx.image.sdk.reader import block_plan, read_sdk, sdk_blocks, sdk_is_laid_out
from softsgx.image.sdk.settings import SdkLayout
from softsgx.image.sdk.writer import (
    BlockSpec,
    embed_sigstruct,
    lay_out_sdk,
    sdk_runtime_is_known,
    write_blocks,
)

__all__ = [
    "Block",
    "BlockSpec",
    "Elrange",
    "SdkConfig",
    "SdkLayout",
    "block_plan",
    "choose_block",
    "embed_sigstruct",
    "lay_out_sdk",
    "read_sdk",
    "read_sdk_config",
    "sdk_blocks",
    "sdk_is_laid_out",
    "sdk_runtime_is_known",
    "write_blocks",
]
