"""Faces embedded in a loop in one process: our stages, or what OpenCV brings, put together.

Called with `ours` or `opencv`, how many threads, a photo, a folder for the nets, and seconds.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from services.rustyface.photos import images, pipeline, weights
from services.rustyface.photos.alignment import SIDE, TEMPLATE

Encode = Callable[[bytes], object]


def ours(cache_dir: Path) -> Callable[[], Encode]:
    """Return what makes an encoder of our own stages; threads share the nets."""
    stages = pipeline.load(cache_dir)

    def encode(data: bytes) -> object:
        return stages.analyse(images.decode(data), embedded_max=1)[0].embedding

    return lambda: encode


def opencv(cache_dir: Path) -> Callable[[], Encode]:
    """Return what makes an encoder of OpenCV's own detector and net; each thread has its own.

    The embedding net is opened as shipped, by its blob's name: OpenCV 5's `FaceRecognizerSF` does
    not take that file. So the alignment is the usual one of five points to a template.
    """
    del cache_dir
    detector_file, net_file = (str(weights.find(net)) for net in (weights.YUNET, weights.SFACE))
    template = np.array(TEMPLATE, np.float32)

    def make() -> Encode:
        detector = cv2.FaceDetectorYN.create(detector_file, "", (0, 0), 0.7, 0.3)
        net = cv2.dnn.readNetFromONNX(net_file)

        def encode(data: bytes) -> object:
            image = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))
            detector.setInputSize((image.shape[1], image.shape[0]))
            faces = np.asarray(detector.detect(image)[1])
            move, _ = cv2.estimateAffinePartial2D(
                faces[0, 4:14].reshape(5, 2), template, method=cv2.LMEDS
            )
            crop = cv2.warpAffine(image, move, (SIDE, SIDE))
            net.setInput(cv2.dnn.blobFromImage(crop, swapRB=True), "data")
            vector = np.asarray(net.forward())[0]
            return vector / np.linalg.norm(vector)

        return encode

    return make


def _run(make: Callable[[], Encode], threads: int, data: bytes, seconds: float) -> dict[str, float]:
    """Return images per second, and milliseconds of a processor for each."""
    cv2.setNumThreads(1)
    marks: list[tuple[float, float]] = []

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    begin, end = threading.Barrier(threads, mark), threading.Barrier(threads, mark)

    def loop() -> int:
        encode = make()
        encode(data)
        begin.wait()
        done = 0
        while time.perf_counter() - marks[0][0] < seconds:
            encode(data)
            done += 1
        end.wait()
        return done

    with ThreadPoolExecutor(threads) as workers:
        done = sum(one.result() for one in [workers.submit(loop) for _ in range(threads)])
    took_s, used_s = (last - first for first, last in zip(*marks, strict=True))
    return {"per_s": done / took_s, "cpu_ms": 1e3 * used_s / done}


if __name__ == "__main__":
    name, number, photo, folder, length = sys.argv[1:]
    maker = {"ours": ours, "opencv": opencv}[name](Path(folder))
    told = _run(maker, int(number), Path(photo).read_bytes(), float(length))
    print(json.dumps(told))  # noqa: T201 - its answer
