"""Tokenizing long texts: memory and time by language, of texts that grow fourfold.

python benchmarks/tokenizing.py [MILLION_CHARACTERS]

A text is handed out as `corpus.read` does, in parts of four million characters. Memory must not
grow with the text, and time in proportion to it. Each row is a process of its own.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

LINES = {
    "English": "The quick brown fox jumps over the lazy dog.\n",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.\n",
    "Chinese": "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。寒来暑往，秋收冬藏。",  # noqa: RUF001
    "English with special tokens": "One story ends here.<|endoftext|>Another one begins.",
    "one word": "acgt",  # has no border, so that memory must grow
}
PART = 4_000_000


def parts(line: str, million: int) -> Iterator[str]:
    """The text."""
    part = (line * (1 + PART // len(line)))[:PART]
    for _ in range(million * 1_000_000 // PART):
        yield part


def peak() -> int:
    """MiB that this process has used at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(kind: str, million: int) -> dict[str, object]:
    """Seconds, processor seconds, memory and sizes of pieces of one text."""
    from ravine.datamodules.token_cache import encode_parallel, split_at_word_boundaries
    from ravine.datamodules.tokenizers import load_gpt2_tokenizer

    tokenizer = load_gpt2_tokenizer("allowed" if "special" in kind else "plain")
    tokenizer.encode("warm up")
    pieces = [
        len(piece)
        for piece in split_at_word_boundaries(parts(LINES[kind], min(million, 16)), tokenizer)
    ]
    before, start_s, worked = peak(), time.perf_counter(), time.process_time()
    count = sum(len(numbers) for numbers in encode_parallel(tokenizer, parts(LINES[kind], million)))
    return {
        "what": kind,
        "million_characters": million,
        "tokens": count,
        "longest_piece": max(pieces),
        "seconds_of_clock": round(time.perf_counter() - start_s, 2),
        "processor_seconds": round(time.process_time() - worked, 2),
        "memory_before_MiB": before,
        "memory_after_MiB": peak(),
    }


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        from record import append, machine

        largest = int(sys.argv[1]) if len(sys.argv) > 1 else 64
        for kind in LINES:
            for million in (largest // 4, largest) if kind != "one word" else (4, 8):
                command = [sys.executable, __file__, kind, str(million)]
                row = json.loads(subprocess.check_output(command, text=True))
                append("tokenizing", row | machine())
