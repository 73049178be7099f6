"""Asynchronous processing for servers: videos are decoded in threads, a bounded number at a time.

    video = await aprocess_video("clip.mp4", model="qwen2.5-vl")
    async for outcome in aprocess_videos(urls, concurrency=8): …

Decoders and resizing release the interpreter lock, so that the event loop stays free. A thread cannot be stopped: a
cancelled call returns at once, and its video is finished in the background within its limits. ``isolate=True`` decodes
in a process that ``timeout`` ends.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blueberry_video.video.pool import Outcome
from blueberry_video.video.process import Hooks, VideoProcessor
from blueberry_video.video.ranges import check_at_least
from blueberry_video.video.settings import load_settings

MOST_AT_ONCE = 4  # videos of all calls of ``aprocess_video`` in this process

_threads = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="aprocess_video")


async def aprocess_video(
    source: Any, model: str | Path | None = "qwen2.5-vl", hooks: Hooks | None = None, **overrides: Any
) -> Any:
    """``process_video`` for coroutines, of which at most ``MOST_AT_ONCE`` are decoded at a time; others wait.

    Arguments, result and exceptions are those of :func:`process_video`.
    """
    processor = VideoProcessor(load_settings(model, overrides), hooks)
    return await asyncio.get_running_loop().run_in_executor(_threads, processor, source)


async def aprocess_videos(
    sources: Iterable[Any],
    model: str | Path | None = "qwen2.5-vl",
    hooks: Hooks | None = None,
    concurrency: int = 4,
    **overrides: Any,
) -> AsyncIterator[Outcome]:
    """Processes many videos in threads; a failure does not stop the others.

    Args:
        sources: any iterable, consumed as videos are processed.
        model, hooks, overrides: as :func:`process_video`.
        concurrency: videos in progress at a time, at least 1.

    Yields:
        ``Outcome`` in the order of the sources; ``peak_memory`` is 0, since threads share their memory.

    Raises:
        ValueError: ``concurrency`` below 1, or as :func:`process_video` for the settings.
    """
    check_at_least(1, concurrency=concurrency)
    processor = VideoProcessor(load_settings(model, overrides), hooks)
    loop, items = asyncio.get_running_loop(), enumerate(sources)
    waiting: deque[asyncio.Future[Outcome]] = deque()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="aprocess_videos") as threads:
        try:
            while True:
                while len(waiting) < concurrency and (item := next(items, None)) is not None:
                    waiting.append(loop.run_in_executor(threads, _outcome, processor, *item))
                if not waiting:
                    return
                yield await waiting.popleft()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def _outcome(processor: VideoProcessor, index: int, source: Any) -> Outcome:
    begun = time.monotonic()
    try:
        return Outcome(index, source, processor(source), None, time.monotonic() - begun, 0)
    except Exception as error:  # the outcome of a video is any exception
        return Outcome(index, source, None, error, time.monotonic() - begun, 0)
