"""What every command does around its `main`: flags without effect, and interrupts."""

import signal

import pytest

CHECKPOINT = "--checkpoint=nowhere"
QUANTIZE = ("quantize", CHECKPOINT, "--output=nothing")
GENERATE = ("generate", CHECKPOINT, "--prompt=a")
CONVERT = ("convert", "--input=nowhere", "--output=nothing")
CALIBRATION = "neither a static scheme nor --method=smoothquant, awq, gptq is given"


@pytest.mark.parametrize(
    ("flags", "vain", "where"),
    [
        (("evaluate", CHECKPOINT), "--style=cot_zero_shot", "--task is not given"),
        (("evaluate", CHECKPOINT), "--style=zero_shot", "--task is not given"),  # its default, but given
        (("evaluate", CHECKPOINT, "--harness=piqa"), "--shots=2", "--task is not given"),
        (("evaluate", CHECKPOINT, "--data=x"), "--limit=2", "neither --task nor --harness is given"),
        (("evaluate", CHECKPOINT, "--task=copying"), "--harness_path=x", "--harness is not given"),
        (("evaluate", CHECKPOINT), "--kind=text", "--data is not given"),
        (("evaluate", CHECKPOINT, "--task=copying"), "--stride=4", "--task or --harness is given"),
        (GENERATE, "--draft_tokens=4", "--draft=CHECKPOINT or --draft=prompt is not given"),
        (GENERATE, "--early_stop", "--beams=2 or more is not given"),
        ((*GENERATE, "--beams=2"), "--diversity=0.5", "--beam_groups=2 or more is not given"),
        (GENERATE, "--system=be kind", "--chat is not given"),
        (GENERATE, "--alternatives=3", "--json is not given"),
        ((*GENERATE, "--explain"), "--stop=x", "--explain is given"),
        ((*QUANTIZE, "--scheme=w8a8"), "--sequences=8", CALIBRATION),
        ((*QUANTIZE, "--scheme=int4", "--method=awq"), "--noact_order", "--method=gptq is not given"),
        (QUANTIZE, "--method=gptq", "--scheme is not given"),
        ((*CONVERT, "--to=hf"), "--format=Q8_0", "--to=gguf is not given"),
        ((*CONVERT, "--to=gguf"), "--dtype=float16", "--to=hf is not given"),
        ((*CONVERT, "--to=gguf"), "--family=llama", "neither --to=hf nor --to=peft is given"),
        (("probe_embeddings", "--vectors=nowhere"), "--words=a,b", "--map is not given"),
        (("train_tokenizer", "--kind=byte", "--input=x", "--output=y"), "--sample=3", "--kind=byte is given"),
    ],
)
def test_a_flag_given_in_vain_is_an_error_that_says_what_it_needs(command, flags, vain, where):
    said = command(*flags, vain, code=2).stderr
    assert said == f"error: {vain} has no effect where {where}\n"


@pytest.mark.parametrize(
    "flags",
    [
        ("evaluate", CHECKPOINT),
        ("evaluate", CHECKPOINT, "--data=x", "--kind=text", "--stride=4"),
        (*GENERATE, "--draft=prompt", "--draft_tokens=4"),
        (*GENERATE, "--beams=4", "--beam_groups=2", "--diversity=0.5", "--length_penalty=1"),
        (*QUANTIZE, "--scheme=int4", "--method=gptq", "--act_order", "--sequences=8", "--data=x"),
        (*QUANTIZE, "--scheme=int4", "--rule=layers/0/.*=w8a8_static", "--sequences=8"),
        (*CONVERT, "--to=hf", "--family=llama", "--dtype=float16"),
    ],
)
def test_flags_that_have_what_they_need_are_taken(command, flags):
    assert "nowhere: no such directory" in command(*flags, code=2).stderr


def test_an_interrupted_decoder_says_so_and_nothing_of_checkpoints(command, trained):
    flags = (f"--checkpoint={trained}", "--prompt=a", "--stream", "--ignore_eos", "--max_new_tokens=20000")
    child = command("generate", *flags, start=True)
    assert child.stdout.read(1)  # it is at work
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (130, "\ninterrupted\n")
