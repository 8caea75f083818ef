"""Libraries signed by the Intel SGX SDK."""

from softsgx.image.sdk.metadata import Block, choose_block
from softsgx.image.sdk.reader import block_plan, read_sdk, sdk_blocks

__all__ = ["Block", "block_plan", "choose_block", "read_sdk", "sdk_blocks"]
