"""Text that looks like GSM8K: worded problems, `#### ` answers, a chat template, byte-level BPE, every data format."""

import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from conftest import ROOT, load_all, run_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import cropi
import rollout
import train
from rollout import BadInput, encode_prompts, load_prompts

TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def problems(count: int, seed: int) -> list[dict]:
    random = np.random.default_rng(seed)
    rows = []
    for a, b in random.integers(2, 50, (count, 2)).tolist():
        text = f"Natalia sold {a} clips in April, and {b} more in May. How many clips did she sell altogether?"
        rows.append({"question": text, "answer": f"In May: {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with model/, train.parquet, valid-clips.csv, test-clips.jsonl, test-other.json and a reward file."""
    folder = tmp_path_factory.mktemp("text")
    rows = {"train": problems(40, 0), "valid-clips": problems(6, 1), "test-clips": problems(5, 2)}
    rows["test-other"] = problems(4, 3)
    datasets.Dataset.from_list(rows["train"]).to_parquet(folder / "train.parquet")
    datasets.Dataset.from_list(rows["valid-clips"]).to_csv(folder / "valid-clips.csv")
    datasets.Dataset.from_list(rows["test-clips"]).to_json(folder / "test-clips.jsonl")
    (folder / "test-other.json").write_text(json.dumps(rows["test-other"]))

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([row["question"] + row["answer"] for row in rows["train"]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32: vLLM's CPU build has no smaller ones
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    reward = "def even(prompts, completions, answer, question, **columns):\n"
    reward += "    assert len(question) == len(answer) and '####' in answer[0]\n"
    (folder / "reward.py").write_text(reward + "    return [float(len(c) % 2 == 0) for c in completions]\n")
    return folder


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_run_passes_through_every_stage(world, tmp_path, engine):
    command = [sys.executable, "cropi.py", "run", "--model", world / "model", "--train", world / "train.parquet"]
    command += ["--valid", world / "valid-clips.csv", "--test", f"clips={world / 'test-clips.jsonl'}"]
    command += ["--test", world / "test-other.json", "--stages", "2", "--frac", "0.5", "--engine", engine]
    for setting in (
        *(f"rollout.reward={world / 'reward.py'}:even", "rollout.max_tokens=12", "rollout.samples=4"),
        *("valid.samples=4", "test.samples=2", "train.steps=2", "train.batch_prompts=8", "train.lr=1e-3"),
        *("project.k=128", "rollout.system=Think."),
    ):
        command += ["--set", setting]
    out = tmp_path / "run"
    done = subprocess.run([*map(str, command), "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith("device: ")
    report = json.loads((out / "report.json").read_text())
    assert report["targeted"] == ["clips"] and len(report["evaluations"]) == 3
    tokenizer = rollout.load_model(world / "model")[1]
    stored = load_all(out / "rollouts" / "train")
    text = tokenizer.decode(stored.prompt(0))
    question = load_prompts(world / "train.parquet")[0]["prompt"]
    assert (
        text == f"<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    models = [world / "model", out / "stage-01" / "model", out / "stage-02" / "model"]
    assert train.lineage(models[-1]) == [rollout.model_identity(model) for model in models]
    again = run_script(*command[1:], "--out", out)
    assert again.returncode == 0 and "resuming: 2 of 2 stages trained" in again.stdout
    assert done.stdout.count("\n$ ") > 10 and "\n$ " not in again.stdout
    assert json.loads((out / "report.json").read_text()) == report


def test_math_reward_from_gsm8k_answers(world, tmp_path):
    data = str(world / "train.parquet")
    rollout.rollout(tmp_path / "r", model=world / "model", data=data, samples=2, reward="math", limit=10)
    rewards, (path,) = load_all(tmp_path / "r").rewards, rollout.shards(tmp_path / "r", "trajectories")
    assert rewards.shape == (10, 2) and set(rewards.flatten().tolist()) <= {0.0, 1.0}
    recipe = rollout.peek(path)["recipe"]
    assert recipe["shard"]["count"] == 10
    assert recipe["inputs"]["data"] == load_prompts(data, 10).digest != load_prompts(data).digest


def test_every_format_holds_the_same_rows(tmp_path):
    rows = [{"problem": "1 + 1?", "solution": "2", "level": 3}, {"problem": 'a\nb, "c"', "solution": "007", "level": 4}]
    table = datasets.Dataset.from_list(rows)
    table.to_json(tmp_path / "a.jsonl")
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.json"):
        loaded = load_prompts(tmp_path / name)
        assert [row["prompt"] for row in loaded] == [row["problem"] for row in rows]
        assert [row["answer"] for row in loaded] == ["2", "007"], name
        assert int(loaded[1]["level"]) == 4
        assert len(load_prompts(tmp_path / name, 1)) == 1
    both = f"{tmp_path / 'a.json'}+{tmp_path / 'a.csv'}"
    assert [row["answer"] for row in load_prompts(both)] == ["2", "007"] * 2
    assert [row["answer"] for row in load_prompts(both, 1)] == ["2", "2"]
    whole, three, one, single = (
        load_prompts(*some).digest for some in ((both,), (both, 3), (both, 1), (tmp_path / "a.json",))
    )
    assert whole == three and len({whole, one, single}) == 3  # of the rows as they are used
    assert len({load_prompts(tmp_path / f"a.{kind}").digest for kind in ("json", "jsonl", "csv", "parquet")}) == 1
    nested = [{"prompt": [{"role": "user", "content": "1 + 1?"}], "reward_model": {"ground_truth": 2, "style": "rule"}}]
    (tmp_path / "b.json").write_text(json.dumps(nested))
    assert load_prompts(tmp_path / "b.json")[0]["answer"] == "2"
    assert load_prompts(tmp_path / "b.json")[0]["prompt"] == nested[0]["prompt"]


def test_chat_template_is_that_of_the_tokenizer(world, toy):
    tokenizer = rollout.load_model(world / "model")[1]
    chat = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "1+1"},
    ]
    rows = [{"prompt": "1+1"}, {"prompt": chat}]
    ours = encode_prompts(tokenizer, rows)
    for ids, messages in zip(ours, ([{"role": "user", "content": "1+1"}], chat), strict=True):
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == theirs
    assert "You are helpful." in tokenizer.decode(ours[0])
    (empty,) = encode_prompts(tokenizer, rows[:1], system="")
    assert tokenizer.decode(empty).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user\n")
    own = [{"prompt": [{"role": "system", "content": "its own"}, {"role": "user", "content": "x"}], "answer": "y"}]
    assert "its own" in tokenizer.decode(encode_prompts(tokenizer, own)[0])
    assert tokenizer.decode(encode_prompts(tokenizer, own, system="mine")[0]).count("system") == 1
    tokenizer.chat_template = "{{ raise_exception('no system prompt here') }}"
    with pytest.raises(BadInput, match=r"row 1: the model's chat template refuses the prompt .no system prompt here"):
        encode_prompts(tokenizer, own)
    (plain,) = encode_prompts(tokenizer, rows[:1], chat=False)
    assert tokenizer.decode(plain) == "1+1"
    for tok, some, options in (
        (toy[1], rows[1:], {}),
        (toy[1], rows[:1], {"system": "x"}),
        (tokenizer, rows, {"chat": False}),
    ):
        with pytest.raises(BadInput, match="template"):
            encode_prompts(tok, some, **options)


def test_long_prompts_are_dropped_and_counted(world, tmp_path, capsys):
    rows = [
        {"prompt": "short", "answer": "1"},
        {"prompt": "word " * 300, "answer": "1"},
        {"prompt": "brief", "answer": "1"},
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    options = {"model": world / "model", "data": str(tmp_path / "d.json"), "samples": 2}
    rollout.rollout(tmp_path / "r", **options)
    (path,) = rollout.shards(tmp_path / "r", "trajectories")
    assert load_all(tmp_path / "r").prompt_index.tolist() == [0, 2]
    assert rollout.peek(path)["recipe"]["shard"]["count"] == 3 and rollout.peek(path)["facts"]["trajectories"] == 4
    said = capsys.readouterr().out
    assert "1 of 3 prompts dropped: empty, or longer than 248 tokens (the model's 256 less --max-tokens 8" in said
    with pytest.raises(BadInput, match="3 of 3 prompts dropped"):
        rollout.rollout(tmp_path / "s", **options, max_prompt_tokens=3)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("option", [["--data", "openai/no-such-thing:main"], ["--model", "Qwen/no-such-model"]])
def test_the_hub_out_of_reach_is_one_line(tmp_path, option):
    command = [sys.executable, "rollout.py", *option, "--out", str(tmp_path / "x")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # else its library tries for half a minute
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and option[1] in line


def test_names_of_the_hub(monkeypatch):
    asked = []
    table = datasets.Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or table)
    for source in ("some/set", "some/set:main", "some/set:main:train[:-128]", "some/set::test"):
        assert load_prompts(source)[0]["answer"] == "#### 2"
    expected = [(None, "train"), ("main", "train"), ("main", "train[:-128]"), (None, "test")]
    assert asked == [("some/set", {"name": config, "split": split}) for config, split in expected]
    names = cropi.set_names(["openai/gsm8k:main:test", "a=x/y:z:train[:5]", "/some/test-b.jsonl"], "test-")
    assert names == {"gsm8k": "openai/gsm8k:main:test", "a": "x/y:z:train[:5]", "b": "/some/test-b.jsonl"}


def test_numbers_keep_the_text_of_the_file(tmp_path):
    lines = ['{"prompt": "a", "answer": 72}', '{"prompt": "b", "answer": 72.50}', '{"prompt": "c", "answer": 1e3}']
    (tmp_path / "d.jsonl").write_text("\n".join(line[:-1] + ', "weight": 0.5}' for line in lines))
    rows = load_prompts(tmp_path / "d.jsonl")
    assert [row["answer"] for row in rows] == ["72", "72.50", "1e3"]
    assert [2 * row["weight"] for row in rows] == [1.0] * 3
    (tmp_path / "d.csv").write_text("prompt,answer,weight\na,007,0.5\n")
    assert load_prompts(tmp_path / "d.csv")[0] == {"prompt": "a", "answer": "007", "weight": 0.5}


def test_bad_rows_are_refused_or_dropped_and_counted(tmp_path, capsys):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}, {"answer": "2"}, 7, {"prompt": "c"}]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    with pytest.raises(
        BadInput, match=r"d.json, row 2: no 'answer', or an empty one .*--skip-bad-rows drops such rows"
    ):
        load_prompts(tmp_path / "d.json")
    kept = load_prompts(tmp_path / "d.json", skip_bad_rows=True)
    assert [row["prompt"] for row in kept] == ["a"]
    assert "d.json: 4 of 5 rows dropped, which lack a prompt or an answer" in capsys.readouterr().out


def test_columns_by_name_and_messages(tmp_path):
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "It is 2."}]
    row = {"messages": chat, "task": "2+2", "gold": {"value": 4}, "answer": "2"}
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    (ours,) = load_prompts(tmp_path / "d.jsonl")
    assert (ours["prompt"], ours["answer"]) == (chat[:1], "2")  # without the solution
    (ours,) = load_prompts(tmp_path / "d.jsonl", prompt_column="task", answer_column="gold.value")
    assert (ours["prompt"], ours["answer"]) == ("2+2", "4")
    with pytest.raises(BadInput, match=r"row 1: no 'prompt', or an empty one .looked for prompt: absent; answer: "):
        load_prompts(tmp_path / "d.jsonl", prompt_column="absent")


def test_the_example_of_ones_own_data_reward_and_selector(tmp_path):
    """The command of toy/examples/README.md, as it stands there."""
    text = (ROOT / "toy/examples/README.md").read_text()
    command = text.split("<!-- example command -->\n```bash\n")[1].split("```")[0]
    command = command.replace("python ", f"{sys.executable} ", 1).replace("runs/example", str(tmp_path / "run"))
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["targeted"] == ["rev"] and len(report["evaluations"]) == 3
    assert [entry["chosen"] for entry in report["evaluations"][1:]] == [15, 15]
    stored = load_all(tmp_path / "run" / "rollouts" / "train").rewards
    assert len(np.unique(stored)) > 2  # the reward of the example is no mere right or wrong


def test_characters_that_the_tokenizer_lacks_are_said(toy, capsys):
    rows = [{"prompt": text} for text in ("cpy(12)=", "cpy(Zé)=", "cpy(Z)=")]
    encode_prompts(toy[1], rows, source="d.jsonl")
    assert "warning: d.jsonl: the tokenizer lacks 'Zé', which 2 of 3 prompts have" in capsys.readouterr().out
    encode_prompts(toy[1], rows[:1])
    assert not capsys.readouterr().out
