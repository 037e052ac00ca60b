"""The process in which DeepSparse runs, with the Python and packages of its own environment (see lib/deepsparse.py).

It knows nothing of this library: DeepSparse wants NumPy 1 and older packages than the rest. Started as
``python deepsparse_worker.py MODEL.onnx THREADS INPUTS``; speaks over standard input and output: a request is batch,
length and the int64 inputs one after the other, an answer the number of float32 outputs and each output's shape and
values, or -1 and a message. DeepSparse compiles for one shape, so another shape compiles again.
"""

import os
import struct
import sys
from typing import Any

os.environ["NM_DISABLE_ANALYTICS"] = "True"  # it reports usage over the network otherwise

PAIR, NUMBER = struct.Struct("<ii"), struct.Struct("<i")


def read(stream, size):
    """Exactly ``size`` bytes, or None when the other side is gone."""
    data = stream.read(size)
    return data if len(data) == size else None


def answer(stream, arrays):
    stream.write(NUMBER.pack(len(arrays)))
    for array in arrays:
        stream.write(NUMBER.pack(array.ndim) + struct.pack(f"<{array.ndim}i", *array.shape) + array.tobytes())
    stream.flush()


def fail(stream, error):
    message = f"{type(error).__name__}: {error}".splitlines()[0][:300].encode()
    stream.write(NUMBER.pack(-1) + NUMBER.pack(len(message)) + message)
    stream.flush()


def main() -> None:
    model, threads, inputs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the engine prints must not get between the answers
    import numpy as np
    from deepsparse import Engine, __version__  # type: ignore[import-not-found]

    name = __version__.encode()
    replies.write(NUMBER.pack(len(name)) + name)
    replies.flush()
    engine: Any = None
    compiled = None
    while header := read(requests, PAIR.size):
        shape = PAIR.unpack(header)
        data = read(requests, 8 * shape[0] * shape[1] * inputs)
        if data is None:
            return
        arrays = list(np.frombuffer(data, np.int64).reshape(inputs, *shape))
        try:
            if shape != compiled:
                engine = None  # free the old one first
                engine = Engine(
                    model=model, batch_size=shape[0], num_cores=threads, input_shapes=[list(shape)] * inputs
                )
                compiled = shape
            outputs = engine.run([np.ascontiguousarray(array) for array in arrays])
        except Exception as error:  # whatever it was, the other side has to hear of it
            compiled = None
            fail(replies, error)
            continue
        answer(replies, [np.ascontiguousarray(output, dtype=np.float32) for output in outputs])


if __name__ == "__main__":
    main()
