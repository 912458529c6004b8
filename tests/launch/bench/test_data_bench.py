import json

from data_prep.records import Record
from data_prep.sources import read_trajectory, source
from data_prep.text.tokenizer import load_tokenizer
from launch.bench import data_bench
from recipes.config import Family


def test_lengths_are_limis():
    lengths = data_bench.lengths(data_bench.COUNT)
    assert (min(lengths), max(lengths)) == (data_bench.SHORTEST, data_bench.LONGEST)
    assert abs(sum(lengths) / len(lengths) / data_bench.MEAN - 1) < 0.02


def test_records_are_valid_with_6_to_530_messages(bases):
    made = [
        read_trajectory(Record("", json.dumps(r).encode(), 0), source("limi"))
        for r in data_bench.records(data_bench.lengths(8), seed=0)
    ]
    counts = [len(t.messages) for t in made]
    assert (min(counts), max(counts)) == (6, 530)
    chat = data_bench._Timed(load_tokenizer(bases["qwen3-tiny"]), Family.qwen3)
    rows = list(data_bench._encoding(chat, made[:2]))
    assert len(rows) == 4 and all(row[1] for row in rows)
