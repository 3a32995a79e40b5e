"""The DALI engine: NVIDIA's decoders carry out the plan, on a GPU or on the CPU. The only file that imports DALI.

Python reads and checks a sample's bytes and passes them on, whole or cut, with the plan's numbers (`dali_feed.py`).
DALI decodes them, slices the box, resizes, flips and transposes it. One function builds the graph for both devices, so
tests on a CPU cover it.
"""

import atexit
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import chain
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from shards.common.errors import DataError
from shards.common.machine import available_cores
from shards.decode import WRONG_SIZE
from shards.engines import Request
from shards.engines.dali_feed import INPUTS, InputBatch, Reader, Source
from shards.shardset import ShardSet

if TYPE_CHECKING:
    import torch
    from nvidia.dali.pipeline import Pipeline

VARIANTS = ("region", "whole")
"""What DALI decodes of a JPEG: `region`, the part with the box, cut out of the file by `shards.jpeg.RegionCutter`;
`whole`, all of it. Both are sliced after decoding.

DALI's own region decoding (`decoders.image_slice`) does not help on a GPU. `jpeg_fancy_upsampling` is needed for
libjpeg's pixels. With it, nvJPEG before 13.2 refuses regions of subsampled chroma, and DALI 2.4 decodes on the CPU.
Seen on an H100 with nvJPEG 12.4: right pixels, idle hardware decoders, a warning for every image.
"""


@dataclass(frozen=True)
class Graph:
    """The settings of a graph.

    contents: `jpg`, `raw` or `mixed`. interpolation: one of `plan.INTERPOLATIONS`. device_id: the GPU, None for the
    CPU. threads: DALI's own. prefetch: batches that DALI works on ahead. hw_decoder_load: share of the JPEGs for the
    GPU's hardware decoder, if it has one; the rest is decoded on its general cores (0.65 is DALI's default; not
    measured here).
    """

    contents: str
    device_id: int | None = None
    threads: int = 1
    prefetch: int = 2
    hw_decoder_load: float = 0.65
    interpolation: str = "bilinear"


def build_graph(source: Callable[[], list], graph: Graph, max_batch: int) -> "Pipeline":
    """The pipeline, defined and not yet built. The definition needs no GPU and refuses unknown arguments.

    source: returns a batch as `INPUTS` says, or raises StopIteration. One output: (n, S, S, 3) uint8 RGB.
    """
    from nvidia import dali as module

    dali: Any = module  # its stubs know neither conditionals nor its enumerations
    fn, types = dali.fn, dali.types
    kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[graph.interpolation]

    def decode(payload: Any, start: Any, shape: Any) -> Any:
        """A JPEG's box. Fancy upsampling is what libjpeg does; orientation was applied when packing."""
        options: dict[str, Any] = {"adjust_orientation": False, "output_type": types.RGB}
        if graph.device_id is not None:
            options |= {"device": "mixed", "hw_decoder_load": graph.hw_decoder_load, "jpeg_fancy_upsampling": True}
        return fn.slice(fn.decoders.image(payload, **options), start=start, shape=shape, axes=[0, 1])

    def rows(payload: Any, shape: Any) -> Any:
        """The pixels of a raw sample's box. The box was cut on the CPU, so only the box is transferred."""
        image = fn.reshape(payload, shape=fn.cat(shape, np.array([3], np.int32)), layout="HWC")
        return image if graph.device_id is None else image.gpu()

    @dali.pipeline_def(
        batch_size=max_batch,
        num_threads=graph.threads,
        device_id=graph.device_id,
        prefetch_queue_depth=graph.prefetch,
        exec_dynamic=True,
        enable_conditionals=True,
    )
    def define() -> Any:
        kinds = {"payload": (types.UINT8, 1), "start": (types.INT32, 1), "shape": (types.INT32, 1)}
        kinds |= {"size": (types.FLOAT, 1), "transposed": (types.BOOL, 0), "raw": (types.BOOL, 0)}
        names = INPUTS[graph.contents]
        outputs: Any = fn.external_source(
            source,
            num_outputs=len(names),
            batch=True,
            parallel=False,
            dtype=[kinds[name][0] for name in names],
            ndim=[kinds[name][1] for name in names],
        )
        given = {name: outputs[i] for i, name in enumerate(names)}
        payload, shape = given["payload"], given["shape"]
        if graph.contents == "jpg":
            image = decode(payload, given["start"], shape)
        elif graph.contents == "raw":
            image = rows(payload, shape)
        else:
            if given["raw"]:
                image = rows(payload, shape)
            else:
                image = decode(payload, given["start"], shape)
        image = fn.resize(image, size=given["size"], antialias=False, interp_type=kind)
        if given["transposed"]:
            image = fn.transpose(image, perm=[1, 0, 2], transpose_layout=False)
        return image

    return define()


class _Pipeline:
    """A built pipeline, reused by later runs, because building one takes longer than a batch."""

    def __init__(self, graph: Graph, max_batch: int) -> None:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        self.max_batch = max_batch
        self.source = Source(max_batch)
        pipeline = build_graph(self.source.take, graph, max_batch)
        self._outputs = DALIGenericIterator(pipeline, ["images"], prepare_first_batch=False)
        self._used = False

    def run(self, batches: Iterator[InputBatch]) -> "Iterator[torch.Tensor]":
        """(n, S, S, 3) uint8 of each batch, up to the end, a damaged sample, or a batch that is too large."""
        self.source.open(batches)
        if self._used:
            self._outputs.reset()
        self._used = True
        while True:
            try:
                images = next(self._outputs)[0]["images"]
            except StopIteration:
                return
            self.source.in_progress.popleft()
            yield images

    def drain(self) -> bool:
        """Discard the batches in progress, so that the next run starts clean. False if that failed."""
        self.source.open(iter(()))
        try:
            for _ in self._outputs:
                pass
        except RuntimeError:  # in a discarded batch
            return False
        return True


class DaliEngine:
    """Loads batches through DALI, `prefetch` batches ahead, and reads the bytes of as many more ahead of those."""

    def __init__(
        self,
        data: ShardSet,
        device: str = "cpu",
        threads: int | None = None,
        prefetch: int = 2,
        *,
        contents: str = "mixed",
        variant: str = "region",
        interpolation: str = "bilinear",
    ) -> None:
        """device: `cpu`, `cuda` or `cuda:N`. contents: `jpg` or `raw` if the samples are all of one kind.
        interpolation: one of `plan.INTERPOLATIONS`.

        threads: default, the cores this process may use. Raises ValueError for an unknown variant or contents.
        """
        if variant not in VARIANTS or contents not in INPUTS:
            raise ValueError(f"variant '{variant}' of {VARIANTS}, contents '{contents}' of {tuple(INPUTS)}")
        self.data, self.device = data, device
        self.graph = Graph(
            contents, _device_id(device), threads or available_cores(), prefetch, interpolation=interpolation
        )
        self._reader = Reader(data, contents, prefetch, cutting=variant == "region")
        self._idle: list[_Pipeline] = []
        self._runs: list[_Thread] = []
        self._taking, self._closed = Lock(), False  # runs may use different threads

    def run(self, requests: Iterable[Request], resolution: int) -> "Iterator[torch.Tensor]":
        """See `Engine.run`. A separate thread talks to DALI, so that this takes no time from the training loop."""
        if self.graph.device_id is None:
            with closing(self._one_ahead(self._images(requests, resolution))) as batches:
                for batch in batches:
                    yield batch.permute(0, 3, 1, 2)
                    del batch
            return
        from shards.engines.transfer import hand_over

        copied = _copies(self._images(requests, resolution), self.graph.device_id)
        with closing(self._one_ahead(copied)) as copies:
            for batch, done in copies:
                yield hand_over(batch, done, f"cuda:{self.graph.device_id}")
                del batch, done

    def _one_ahead(self, items: Generator[Any, None, None]) -> Generator[Any, None, None]:
        """Run a generator on its own thread: it makes the next item while the caller uses the last one.

        Closing this lets the thread end, and does not wait for that: the next run does, and `close`.
        """
        self._settle()
        thread = _Thread(items)
        self._runs.append(thread)
        thread.ask()
        try:
            while (item := thread.item()) is not None:
                thread.ask()
                yield item
                del item
        finally:
            thread.end()

    def _settle(self) -> None:
        """Wait for runs that are ending: their pipelines can then be used again."""
        for run in list(self._runs):
            if run.ending:
                run.wait()
                with suppress(ValueError):  # another thread has removed it
                    self._runs.remove(run)

    def _images(self, requests: Iterable[Request], resolution: int) -> "Generator[torch.Tensor, None, None]":
        """(n, S, S, 3) uint8 in DALI's memory."""
        batches = self._reader.batches(requests, resolution)
        try:
            first = next(batches, None)
            while first is not None:
                pipeline, source = self._take_pipeline(len(first.samples)), chain([first], batches)
                del first  # its bytes need not wait for the end of the epoch
                try:
                    yield from pipeline.run(source)
                except GeneratorExit:
                    if pipeline.drain():
                        self._put_back(pipeline)
                    raise
                except RuntimeError as error:  # DALI's; this pipeline cannot be used again
                    self._name_undecodable(pipeline.source.in_progress, error)
                    raise
                error, first = pipeline.source.error, pipeline.source.too_large
                self._put_back(pipeline)  # from here on another run may have it
                if error is not None:
                    raise error
        finally:
            batches.close()

    def _take_pipeline(self, batch: int) -> _Pipeline:
        """An idle pipeline for a batch of this size, or a new one. Smaller idle pipelines are dropped."""
        with self._taking:
            self._idle[:] = [pipeline for pipeline in self._idle if pipeline.max_batch >= batch]
            if self._idle:
                return self._idle.pop()
        return _Pipeline(self.graph, batch)

    def _put_back(self, pipeline: _Pipeline) -> None:
        """Keep a pipeline for the next run, unless the engine is closed."""
        with self._taking:
            if not self._closed:
                self._idle.append(pipeline)

    def _name_undecodable(self, in_progress: Iterable[np.ndarray], error: RuntimeError) -> None:
        """Raise DataError naming the sample that stopped DALI, if one of those in progress cannot be decoded."""
        for sample in np.concatenate([np.empty(0, np.int64), *in_progress]).tolist():
            self.data.read(sample)  # names one whose checksum differs
            try:
                self.data.pixels(sample)
            except DataError:
                raise self.data.damaged(sample, WRONG_SIZE) from error

    def close(self) -> None:
        """Release threads, pipelines and their memory. Yielded batches stay valid."""
        self._settle()
        self._reader.close()
        with self._taking:
            self._closed = True
            self._idle.clear()


def _device_id(device: str) -> int | None:
    """The GPU's number, None for the CPU."""
    if device == "cpu":
        return None
    import torch

    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index


class _Thread:
    """Runs a generator on a thread of its own, from its first item to its end, which is on that thread too.

    A Loader that nobody closed is closed by Python's garbage collector: on any thread, at any moment, even while that
    thread holds a lock. So `end` takes no lock and waits for nothing, and DALI is never called from there.
    """

    def __init__(self, items: Generator[Any, None, None]) -> None:
        self.ending = False
        self._asked: SimpleQueue[bool] = SimpleQueue()  # its `put` may interrupt itself, unlike that of other queues
        self._made: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._thread = Thread(target=self._run, args=(items,), name="shards-dali-run", daemon=True)
        atexit.register(self.at_exit)
        self._thread.start()

    def ask(self) -> None:
        """Let the thread make the next item."""
        self._asked.put(True)

    def item(self) -> Any:
        """The item that was asked for, None after the last one. Raises what the generator raised."""
        item, error = self._made.get()
        if error is not None:
            raise error
        return item

    def end(self) -> None:
        """Let the thread close the generator, and end; first it makes what it was asked for."""
        self.ending = True
        self._asked.put(False)

    def wait(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def at_exit(self) -> None:
        """End before Python does: DALI cannot be called after that."""
        self.end()
        self.wait()

    def _run(self, items: Generator[Any, None, None]) -> None:
        try:
            with closing(items):
                while self._asked.get():
                    try:
                        self._made.put((next(items, None), None))
                    except BaseException as error:  # noqa: BLE001 (`item` raises it)
                        self._made.put((None, error))
                self._made = SimpleQueue()  # what nobody takes is in DALI's memory, which it needs to end
        finally:
            atexit.unregister(self.at_exit)


def _copies(
    batches: "Generator[torch.Tensor, None, None]", device: int
) -> "Generator[tuple[torch.Tensor, torch.cuda.Event], None, None]":
    """Copies of DALI's batches, (n, S, S, 3) uint8, in PyTorch's GPU memory, each with the event that ends its copy.

    DLPack tells DALI when a tensor is dropped, but not when the kernels that read it are done. So the consumer gets a
    copy, made on a separate stream, and DALI gets its memory back once that copy is done.
    """
    import torch

    copies = torch.cuda.Stream(device)
    copying: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
    try:
        while True:
            while copying and copying[0][1].query():
                copying.popleft()
            with torch.cuda.stream(copies):  # DALI makes it wait for the batch
                batch = next(batches, None)
                if batch is None:
                    return
                own, done = batch.clone(), torch.cuda.Event()
                done.record(copies)
            copying.append((batch, done))
            del batch
            yield own, done
            del own, done
    finally:
        for _, done in copying:
            done.synchronize()
        batches.close()
