"""Python objects through a Unix socket; large arrays go beside it in memory that both sides map instead of copying.

The memory is an anonymous file that travels as a descriptor: it has no name, so nothing can be left behind in
/dev/shm, whoever is killed, and the size of /dev/shm does not matter. Linux only. Who talks to whom is `workers.py`.
"""

import io
import os
import pickle
import socket
import struct
from pickle import PickleBuffer

import numpy as np
import torch

_HEADER = struct.Struct("<QQ")  # bytes of the body, number of shared buffers
_SMALLEST = 16 * 1024  # bytes; smaller buffers cost less inside the body
_ALIGNMENT = 64  # bytes


class _Pickler(pickle.Pickler):
    """Writes pictures plane by plane, as the model takes them, so that nobody downstream transposes them again."""

    def reducer_override(self, value):
        if type(value) is not np.ndarray or value.dtype != np.uint8 or value.ndim != 3:
            return NotImplemented
        planes = np.ascontiguousarray(value.transpose(2, 0, 1))
        return _picture, (planes.reshape(-1), planes.shape)


def _picture(planes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    return planes.reshape(shape).transpose(1, 2, 0)


def send(channel: socket.socket, message: object) -> None:
    """Send `message`. uint8 arrays [H, W, C] arrive with that shape but [C, H, W] in memory. Raises OSError."""
    buffers: list[PickleBuffer] = []
    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=lambda buffer: _stays_inside(buffer, buffers)).dump(message)
    sizes = struct.pack(f"<{len(buffers)}Q", *(len(buffer.raw()) for buffer in buffers))
    header = _HEADER.pack(stream.tell(), len(buffers))
    if not buffers:
        channel.sendall(header + stream.getvalue())
        return
    segment = _shared(buffers)
    try:
        socket.send_fds(channel, [header], [segment])
    finally:
        os.close(segment)
    channel.sendall(sizes + stream.getvalue())


def receive(channel: socket.socket) -> object:
    """The next message. Its large arrays keep the shared memory they lie in alive.

    Raises EOFError when the other side is gone and OSError, TimeoutError among them, when the channel fails.
    """
    header, descriptors, _, _ = socket.recv_fds(channel, _HEADER.size, 1)
    try:
        if not header:
            raise EOFError("the other side closed the channel")
        length, number = _HEADER.unpack(header + _read(channel, _HEADER.size - len(header)))
        sizes = struct.unpack(f"<{number}Q", _read(channel, 8 * number))
        body = _read(channel, length)
        return pickle.loads(body, buffers=_mapped(descriptors[0], sizes) if number else ())
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _stays_inside(buffer: PickleBuffer, buffers: list[PickleBuffer]) -> bool:
    """Whether `buffer` belongs into the body; if not it is put on the list."""
    if len(buffer.raw()) < _SMALLEST:
        return True
    buffers.append(buffer)
    return False


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _shared(buffers: list[PickleBuffer]) -> int:
    """Descriptor of anonymous memory with the buffers one behind another."""
    segment = os.memfd_create("pictures", os.MFD_CLOEXEC)
    try:
        start = 0
        for buffer in buffers:
            content = buffer.raw()
            done = 0
            while done < len(content):  # the kernel may take less than asked for, above 2 GiB it always does
                done += os.pwrite(segment, content[done:], start + done)
            start += _aligned(len(content))
        os.ftruncate(segment, start)
    except BaseException:
        os.close(segment)
        raise
    return segment


def _mapped(segment: int, sizes: tuple[int, ...]) -> list[memoryview]:
    # Not mmap.mmap: it holds a descriptor per segment, and thousands of samples may wait.
    total = sum(map(_aligned, sizes))
    memory = memoryview(torch.from_file(f"/proc/self/fd/{segment}", shared=True, size=total, dtype=torch.uint8).numpy())
    buffers, start = [], 0
    for size in sizes:
        buffers.append(memory[start : start + size])
        start += _aligned(size)
    return buffers


def _read(channel: socket.socket, size: int) -> bytearray:
    """Exactly `size` bytes."""
    content = bytearray(size)
    view = memoryview(content)
    while view:
        received = channel.recv_into(view)
        if not received:
            raise EOFError("the other side closed the channel in the middle of a message")
        view = view[received:]
    return content
