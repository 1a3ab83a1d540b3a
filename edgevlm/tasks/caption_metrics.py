"""Caption metrics as everyone reports them: BLEU, METEOR, ROUGE-L, CIDEr and SPICE by pycocoevalcap.

What cannot be measured on a machine (METEOR and the official tokeniser need Java, SPICE its 400 MB of models) is
reported as not measured, with the reason. Nothing is written into the library's folder and no JVM outlives a call.
"""

import contextlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgevlm.errors import DataError

NO_JAVA = "no Java runtime on the PATH"
SPICE_MODELS = ("lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")

Lines = dict[str, list[str]]
"""Image -> its captions, tokenised, the words separated by spaces."""


@dataclass(frozen=True)
class CaptionScores:
    """The metrics of one set of captions."""

    values: dict[str, float]
    """bleu1 to bleu4, meteor, rouge_l and spice in 0..1, cider in 0..10: the form in which pycocoevalcap gives them."""
    tokenizer: str
    """`ptb` (the official one), or `plain` where there is no Java: such scores are close to the official, not equal."""
    not_measured: dict[str, str] = field(default_factory=dict)
    """Metric -> reason."""


def score_captions(
    references: Mapping[str, Sequence[str]], captions: Mapping[str, str], *, slow: bool = True
) -> CaptionScores:
    """Score one caption per image against its references.

    CIDEr takes its document frequencies from these references: scores of different sets of images are not comparable.

    Args:
        references: image -> its reference captions.
        captions: image -> the caption to score.
        slow: METEOR and SPICE too. METEOR alone takes 10 to 20 s of a CPU before its first score.

    Raises:
        DataError: other images in one than in the other, none at all, or an image without references.
    """
    _check(references, captions)
    java = shutil.which("java")
    texts = [text for image in references for text in (*references[image], captions[image])]
    words = iter(_ptb_tokens(texts, java) if java else map(plain_tokens, texts))
    truth: Lines = {}
    said: Lines = {}
    for image in references:
        truth[image] = [next(words) for _ in references[image]]
        said[image] = [next(words)]
    values = _bleu_rouge_cider(truth, said)
    not_measured: dict[str, str] = {}
    measures: dict[str, Callable[[Lines, Lines], float | str]] = {"meteor": _meteor, "spice": _spice}
    for name, measure in measures.items() if slow else ():
        result = measure(truth, said) if java else NO_JAVA
        if isinstance(result, str):
            not_measured[name] = result
        else:
            values[name] = result
    return CaptionScores(values, "ptb" if java else "plain", not_measured)


def plain_tokens(text: str) -> str:
    """Lower-case words without punctuation, where the official tokeniser cannot run."""
    return " ".join(re.findall(r"\w+(?:[-.]\w+)*|'\w+", text.lower()))


def _check(references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> None:
    if differing := sorted(references.keys() ^ captions.keys()):
        which = "references" if differing[0] in captions else "a caption"
        raise DataError(
            f"{len(differing)} images have only references or only a caption ('{differing[0]}' lacks {which})",
            "Give both for the same images",
        )
    if not references:
        raise DataError("There are no captions to score", "Check the split")
    if empty := [image for image, texts in references.items() if not texts]:
        raise DataError(f"Image '{empty[0]}' has no reference captions", "Leave it out of the evaluation")


def _ptb_tokens(texts: Sequence[str], java: str) -> list[str]:
    """The official tokenisation: Stanford's PTB tokens in lower case, less pycocoevalcap's list of punctuation.

    The jar is run by us, through pipes: the library's own wrapper writes its input into its installation folder.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer as official

    jar = Path(official.__file__).parent / official.STANFORD_CORENLP_3_4_1_JAR
    command = [java, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    # One line per caption: whatever Unicode calls a line break becomes a space.
    lines = "".join(f"{' '.join(text.split())}\n" for text in texts)
    run = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    tokenised = run.stdout.decode().split("\n")[: len(texts)]
    if run.returncode or len(tokenised) < len(texts):
        raise DataError(
            f"The PTB tokeniser failed ({_last_line(run.stderr)})", f"Check that {java} runs, or take it off the PATH"
        )
    removed = set(official.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in removed) for line in tokenised]


def _bleu_rouge_cider(truth: Lines, said: Lines) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    bleu, _ = Bleu(4).compute_score(truth, said, verbose=0)
    values = {f"bleu{n}": float(value) for n, value in enumerate(bleu, 1)}
    return values | {
        name: float(scorer.compute_score(truth, said)[0]) for name, scorer in (("rouge_l", Rouge()), ("cider", Cider()))
    }


def _meteor(truth: Lines, said: Lines) -> float | str:
    """METEOR 1.5, or why there is none."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        return float(meteor.compute_score(truth, said)[0])
    except (OSError, ValueError):  # a dead JVM: a broken pipe, or an empty line where a number was due
        meteor.meteor_p.kill()
        return f"METEOR stopped ({_last_line(meteor.meteor_p.stderr.read())})"  # pyright: ignore
    finally:
        # The library leaves all this to the garbage collector, and after an error its lock would never be free again.
        if meteor.lock.locked():
            meteor.lock.release()
        process = meteor.meteor_p
        process.kill()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what was still to be written has no reader any more
                    pipe.close()
        process.wait()


def _spice(truth: Lines, said: Lines) -> float | str:
    """SPICE, or why there is none; its models are never fetched from here."""
    from pycocoevalcap.spice import spice

    folder = Path(spice.__file__).parent
    if missing := [name for name in SPICE_MODELS if not (folder / name).is_file()]:
        return f"its models are not installed ({folder / missing[0]})"
    with tempfile.TemporaryDirectory() as work:
        # The library joins these to its own folder; joined to an absolute path, that folder drops out.
        names = {"TEMP_DIR": f"{work}/tmp", "CACHE_DIR": f"{work}/cache"}
        old = {name: getattr(spice, name) for name in names}
        try:
            for name, value in names.items():
                setattr(spice, name, value)
            return float(spice.Spice().compute_score(truth, said)[0])
        except (OSError, ValueError, subprocess.CalledProcessError) as problem:
            return f"SPICE stopped ({problem})"
        finally:
            for name, value in old.items():
                setattr(spice, name, value)


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"
