"""Verdicts: as a mathematician would give them, in time, and one that fails costs only itself."""

import time

import numpy as np
import pytest

import rollout
from rollout import BadInput, final_answer, known_reward, load_function, verify

NESTED = r"\frac{1}{" * 3000 + "2" + "}" * 3000
# (the data's answer, the completion, equal?)
PAIRS = [
    # other forms of the same number
    ("1/2", r"\boxed{0.5}", True),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    (r"\frac12", r"\boxed{1/2}", True),
    (r"\dfrac{3}{4}", r"\boxed{\tfrac{3}{4}}", True),
    (r"\frac{3}{4}", r"\boxed{0.75}", True),
    (r"-\frac{1}{3}", r"\boxed{\frac{-1}{3}}", True),
    (r"\frac{6}{8}", r"\boxed{\frac{3}{4}}", True),
    ("1,000", r"\boxed{1000}", True),
    ("1000", r"\boxed{1,000}", True),
    ("1000", r"\boxed{1{,}000}", True),
    ("12345678", r"\boxed{12,345,678}", True),
    ("1,234.5", r"\boxed{1234.50}", True),
    ("7", r"\boxed{7.0}", True),
    ("7", r"\boxed{007}", True),
    (".5", r"\boxed{0.50}", True),
    (r"2\frac{1}{2}", r"\boxed{\frac{5}{2}}", True),
    ("1024", r"\boxed{2^{10}}", True),
    ("0.001", r"\boxed{10^{-3}}", True),
    ("120", r"\boxed{5!}", True),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", True),
    (r"\frac{1}{\sqrt{2}}", r"\boxed{\frac{\sqrt{2}}{2}}", True),
    (r"\frac{\pi}{2}", r"\boxed{\pi/2}", True),
    (r"\log_2 8", r"\boxed{3}", True),
    # units, percent, currency, degrees, dressing
    ("5", r"\boxed{5\text{ cm}}", True),
    (r"5 \text{ cm}", r"\boxed{5}", True),
    ("18", r"\boxed{\$18}", True),
    (r"\$18.00", r"\boxed{18}", True),
    (r"50\%", r"\boxed{50\%}", True),
    (r"50\%", r"\boxed{0.5}", True),
    ("90", r"\boxed{90^\circ}", True),
    (r"90^{\circ}", r"\boxed{90}", True),
    ("3", r"\boxed{x = 3}", True),
    ("x=3", r"\boxed{3}", True),
    ("3", r"\boxed{ 3. }", True),
    (r"\text{yes}", r"\boxed{yes}", True),
    ("A", r"\boxed{\text{A}}", True),
    (r"\text{(C)}", r"\boxed{(C)}", True),
    ("18", "#### 18 dollars", True),
    ("18", r"\boxed{18~\text{eggs}}", True),
    ("18", r"\boxed{\text{18 dollars}}", True),
    ("18", "#### €18", True),
    ("5", "#### **5**", True),
    ("5", "\\boxed{5}\n\n#### Verification", True),
    ("5", r"$\boxed 5$", True),
    ("5", r"\fbox{5}", True),
    ("1,2", r"\boxed{x=1 \text{ or } x=2}", True),
    ("18", r"\boxed{18\,}", True),
    ("18", r"\boxed{18\,\text{cm}}", True),
    ("12", r"\boxed{12 apples}", True),
    ("1.5", r"\boxed{1.5 hours}", True),
    ("5", r"\boxed{5 \text{ m/s}}", True),
    ("5", r"\boxed{5\text{ cm}^2}", True),
    ("1/2", r"\boxed{1/2 \text{ of a mile}}", True),
    ("18", r"\boxed{18" + " " * 250 + "}", True),
    (r"50\%", r"\boxed{50 percent}", True),
    ("50", r"\boxed{50 percent}", True),
    ("0.5", r"\boxed{50 percent}", True),
    ("0.5", r"\boxed{50 \text{ percent}}", True),
    # words
    ("East", r"\boxed{\text{East}}", True),
    (r"\text{East}", r"\boxed{East}", True),
    ("North", r"\boxed{north}", True),
    ("no solution", r"\boxed{\text{no solution}}", True),
    # equations and relations
    ("18", r"\boxed{12 + 6 = 18}", True),
    ("18", "12 + 6 = 18 #### 12 + 6 = 18", True),
    ("y=2x+1", r"\boxed{2x+1=y}", True),
    ("x>1", r"\boxed{(1,\infty)}", True),
    ("(1,2)", r"\boxed{1<x<2}", True),
    ("6", r"\boxed{2 \cdot 3}", True),
    ("3,5", r"\boxed{3 \text{ and } 5}", True),
    # algebra, tuples, sets, intervals, matrices
    ("(x+1)^2", r"\boxed{x^2+2x+1}", True),
    ("x^2-1", r"\boxed{(x-1)(x+1)}", True),
    ("(1,2)", r"\boxed{(1, 2)}", True),
    (r"\left(\frac{1}{2}, 3\right)", r"\boxed{(0.5,3)}", True),
    (r"\{1,2\}", r"\boxed{\{2, 1\}}", True),
    ("[0,1)", r"\boxed{[0, 1)}", True),
    (r"(-\infty, 2]", r"\boxed{(-\infty,2]}", True),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", True),
    ("3+4i", r"\boxed{4i+3}", True),
    # where the answer stands
    ("42", "6 * 7 = 42\n#### 42", True),
    ("Tom has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "He has seven.\n#### 7", True),
    ("Tom has 7.\n#### 7", r"so \boxed{7}", True),
    ("7", r"first \boxed{5}, no: \boxed{7}.", True),
    (r"so it is $\boxed{\frac{1}{2}}$.", r"\boxed{\frac{2}{4}}", True),
    ("7", "#### 5, no:\n#### 7\nThat is all.", True),
    ("1200", "#### $1,200", True),
    ("7", r"#### 5 but \boxed{7}", True),
    ("18", "#### Answer: 18", True),
    ("18", "#### **Answer:** 18 dollars", True),
    ("18", "#### The answer: $18", True),
    ("18", "#### The final answer is 18.", True),
    ("18", "#### Final Answer\n18", True),
    ("18", "#### Final Answer\n\n**18**", True),
    # near, and wrong
    ("East", r"\boxed{Seat}", False),
    ("East", r"\boxed{\text{Seat}}", False),
    (r"\text{East}", r"\boxed{\text{West}}", False),
    ("3", r"\boxed{\text{three}}", False),
    ("25", r"\boxed{20 percent}", False),
    ("18", "#### Answer: 17", False),
    ("18", r"\boxed{12 + 7 = 19}", False),
    ("1/3", r"\boxed{0.33}", False),
    (r"\pi", r"\boxed{3.14}", False),
    (r"\sqrt{2}", r"\boxed{1.414}", False),
    ("1000", r"\boxed{100}", False),
    ("1,000", r"\boxed{1}", False),
    ("1000", r"\boxed{1,0000}", False),
    ("(1,2)", r"\boxed{(2,1)}", False),
    ("[0,1)", r"\boxed{[0,1]}", False),
    ("(0,1)", r"\boxed{[0,1]}", False),
    (r"\{1,2\}", r"\boxed{\{1,2,3\}}", False),
    ("x^2", r"\boxed{x^3}", False),
    ("x^2", r"\boxed{x}", False),
    ("5", r"\boxed{-5}", False),
    (r"\frac{2}{3}", r"\boxed{\frac{3}{2}}", False),
    ("7", r"\boxed{7.5}", False),
    ("0.5", r"\boxed{0.05}", False),
    ("12", r"\boxed{1 2 3}", False),
    (r"2\sqrt{2}", r"\boxed{\sqrt{2}}", False),
    ("10^{-3}", r"\boxed{10^3}", False),
    (r"50\%", r"\boxed{5\%}", False),
    ("3+4i", r"\boxed{3-4i}", False),
    (r"\text{yes}", r"\boxed{no}", False),
    ("A", r"\boxed{B}", False),
    ("7", r"\boxed{5} rather than 7", False),
    ("7", "it is 7", False),  # in neither form
    ("7", r"\boxed{7} or maybe \boxed{8}", False),
    ("9", r"\boxed{9 \text{ and a half}}", False),
    ("8", r"\boxed{8 \text{ hours and } 30 \text{ minutes}}", False),
    ("8", r"\boxed{8\text{ hours }30\text{ minutes}}", False),
    ("8", r"\boxed{8 hours 30 minutes}", False),
    ("9", r"\boxed{9 and a half}", False),
    ("1,234", r"\boxed{1,234 or 1,235}", False),
    ("5", r"\boxed{5 \text{ thousand}}", False),
    ("7", r"\boxed{7 \text{ or } 8}", False),
    ("18", r"\boxed{18x}", False),
    # nothing there, or not to be parsed
    ("5", "", False),
    ("5", r"\boxed{}", False),
    ("5", r"\boxed{5", False),
    ("5", r"\boxed{\frac{5}{}}", False),
    ("5", r"\boxed{???}", False),
    ("5", r"\boxed{five or so, who knows}", False),
    ("5", "####", False),
    ("5", "\x00\ud7ff\u202e", False),
    # made to hurt
    ("5", "{" * 100_000, False),
    ("5", r"\boxed{" * 15_000, False),
    ("5", r"\boxed{" + "{" * 50_000 + "5" + "}" * 50_001, False),
    ("5", "}" * 100_000 + r"\boxed{5}", True),
    ("5", rf"\boxed{{{NESTED}}}", False),
    ("5", r"\boxed{" + "1" * 100_000 + "}", False),
    ("5", r"\boxed{9^{9^{9^{9}}}}", False),
    ("5", r"\boxed{" + "+".join(["x"] * 20_000) + "}", False),
    ("5", r"\boxed{(10^{10})!}", False),
    ("5", "#### " + "(" * 50_000, False),
    ("18", r"\boxed{18" + " " * 27 + "!}", False),
    ("18", r"\boxed{18" + "\\ " * 120 + "x1}", False),
    ("5", r"\boxed{" + r"\sqrt{" * 500 + "5" + "}" * 501, False),
]
# What math-verify says where a mathematician might not: we do not argue.
MATH_VERIFY = [
    ("5", r"\boxed{5 = x}", False),  # it looks on the right of the sign
    ("5", r"\boxed{4=5}", True),
    ("11.5", r"\boxed{11 1/2}", False),  # 11 · 1/2 + ...
    ("11001_2", r"\boxed{11001_3}", True),  # bases are dropped
    ("(1,2)", r"\boxed{\{1,2\}}", True),
    ("5", r"\boxed{[5]}", True),
]


def test_verdicts_are_a_mathematicians():
    assert len(PAIRS) >= 120
    verify("math", [{"prompt": "?", "answer": "1"}], [r"\boxed{1}"])  # starts the processes
    wrong, slow = [], []
    for answer, completion, equal in PAIRS + MATH_VERIFY:
        seconds = []
        while not seconds or (seconds[-1] > 1 and len(seconds) < 3):  # the machine may be busy
            start = time.perf_counter()
            verdict, counts = verify("math", [{"prompt": "?", "answer": answer}], [completion])
            seconds.append(time.perf_counter() - start)
        if min(seconds) > 1:
            slow.append((answer, completion[:40], counts))
        if verdict != equal or any(counts.values()):
            wrong.append((answer, completion[:40], verdict, counts))
    assert not wrong
    assert not slow


def test_final_answer_counts_braces():
    assert final_answer(r"\boxed{\frac{1}{\sqrt{2}}} is it") == r"\frac{1}{\sqrt{2}}"
    assert final_answer(r"\boxed{1} \boxed{2}") == "2"
    assert final_answer(r"#### 1,234" "\nmore") == "1,234"
    assert final_answer("no answer") is None and final_answer(r"\boxed{1") is None


REWARDS = """
import os, time

def length(prompts, completions, answer, weight, **columns):
    assert len(prompts) == len(completions) == len(answer) == len(weight)
    return [len(c) * w for c, w in zip(completions, weight)]

def chat(prompts, completions, **columns):
    assert all(c[-1]["role"] == "assistant" for c in completions)
    return [float(c[-1]["content"] == p[-1]["content"]) for p, c in zip(prompts, completions)]

def hangs(completions, **columns):
    if completions[0] == "hang":
        time.sleep(3600)
    if completions[0] == "die":
        os.kill(os.getpid(), 9)
    if completions[0] == "raise":
        raise KeyError("no such thing")
    return [1.0]

def prompts_and_completions(prompts, completions, **columns):
    return [float(prompts == ["p"] and completions == ["a"] and not columns)]

def two(completions, **columns):
    return [1.0, 2.0]

def nan(completions, **columns):
    return [float("nan")]

def text(completions, **columns):
    return ["1.0"]

def none(completions, **columns):
    return [None]

def scalar(completions, **columns):
    return 1.0
"""


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(REWARDS)
    return file


def test_own_rewards_get_the_columns(rewards):
    rows = [{"prompt": "p", "answer": "a", "weight": w} for w in (1.0, 0.5)]
    verdicts, counts = verify(f"{rewards}:length", rows, ["abc", "abcd"])
    np.testing.assert_array_equal(verdicts, [3.0, 2.0])
    assert verdicts.dtype == np.float32 and counts == {"errors": 0, "timeouts": 0}
    rows = [{"prompt": [{"role": "user", "content": "echo"}], "answer": "a"}] * 2
    np.testing.assert_array_equal(verify(f"{rewards}:chat", rows, ["echo", "no"])[0], [1.0, 0.0])


def test_a_verdict_that_hangs_or_dies_costs_itself_alone(rewards):
    texts = ["a", "hang", "b", "die", "c", "raise", *"defghij"]
    rows = [{"prompt": "p", "answer": "a"}] * len(texts)
    start = time.perf_counter()
    verdicts, counts = verify(f"{rewards}:hangs", rows, texts, seconds=1.0, allowed=6)
    assert counts == {"errors": 2, "timeouts": 1}
    assert verdicts.tolist() == [float(text not in ("hang", "die", "raise")) for text in texts]
    assert time.perf_counter() - start < 120
    verdicts, counts = verify(
        f"{rewards}:prompts_and_completions", [{"prompt": "p", "prompts": 1, "completions": 2}], ["a"]
    )
    assert verdicts.tolist() == [1.0] and not any(counts.values())


def test_a_hung_verdict_costs_its_limit_alone(rewards):
    """Worker by worker: the next one does not import everything anew."""
    rows, texts = [{"prompt": "p", "answer": "a"}] * 5, ["hang"] * 4 + ["a"]
    verify(f"{rewards}:hangs", rows[:1], ["a"])  # starts the processes
    start = time.perf_counter()
    assert verify(f"{rewards}:hangs", rows, texts, seconds=0.5, allowed=4)[1]["timeouts"] == 4
    assert time.perf_counter() - start < 4 * 1.5
    with pytest.raises(
        BadInput, match=r"1 errors, 1 timeouts in 2 of 3 verdicts, more than --max-errors; .*no such thing"
    ):
        verify(f"{rewards}:hangs", rows[:3], ["raise", "hang", "a"], seconds=1.0)
    assert verify(f"{rewards}:hangs", rows[:2], ["raise", "a"])[1]["errors"] == 1  # a single one always may


@pytest.mark.parametrize("name", ["two", "nan", "text", "none", "scalar"])
def test_what_is_no_reward_is_refused_by_name(rewards, name):
    with pytest.raises(BadInput, match=rf"reward '.*mine.py:{name}' returned .*, not a list of one finite number"):
        verify(f"{rewards}:{name}", [{"prompt": "p", "answer": "a"}], ["x"])


def test_unknown_rewards_are_refused(rewards, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module_anywhere\n")
    for reward, says in (
        ("exactly", "no reward 'exactly'; it is one of exact, math or FILE.py:FUNCTION"),
        (f"{rewards}:absent", "has no function absent"),
        ("missing.py:f", "no file missing.py"),
        (f"{broken}:f", "does not run .ModuleNotFoundError"),
    ):
        with pytest.raises(BadInput, match=says):
            known_reward(reward)
    assert load_function("exact", rollout.REWARDS, "reward") is rollout.exact
    assert load_function(f"{rewards}:two", rollout.REWARDS, "reward")(completions=["x"]) == [1.0, 2.0]
