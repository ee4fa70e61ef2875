"""Other people's model files: Hugging Face folders and hub names, GGUF, ONNX."""

from mtnlg.interop.architectures import nearest_architecture
from mtnlg.interop.foreign import open_foreign
from mtnlg.interop.gguf_file import write_gguf
from mtnlg.interop.gguf_reader import open_gguf
from mtnlg.interop.hub import fetch_from_hub, looks_like_hub_name
from mtnlg.interop.hugging_face import (
    read_config,
    read_weights,
    stream_weights,
    write_hugging_face,
    write_hugging_face_folder,
)
from mtnlg.interop.megatron import write_megatron
from mtnlg.interop.onnx_file import write_onnx
from mtnlg.interop.tensor_folder import TensorFolder, write_tensors

__all__ = [
    "TensorFolder",
    "fetch_from_hub",
    "looks_like_hub_name",
    "nearest_architecture",
    "open_foreign",
    "open_gguf",
    "read_config",
    "read_weights",
    "stream_weights",
    "write_gguf",
    "write_hugging_face",
    "write_hugging_face_folder",
    "write_megatron",
    "write_onnx",
    "write_tensors",
]
