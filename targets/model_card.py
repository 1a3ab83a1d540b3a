"""MODEL_CARD.md of a bundle, written from its manifest: nothing here is typed by hand."""

from edgevlm.artifacts import Bundle, Governor


def model_card(bundle: Bundle, governor: Governor | None = None) -> str:
    """The card as Markdown."""
    spec, labels, origin = bundle.preprocess, bundle.labels, bundle.provenance
    regions = bundle.model.tee.num_regions
    lines = [
        f"# {bundle.name}",
        "",
        f"Answers questions about an image (task: {bundle.task}), one of {len(bundle.labels.answers)} fixed answers. "
        f"Exported by edgevlm {origin.edgevlm or '(unversioned)'}{f' on {origin.created}' if origin.created else ''}.",
        "",
        "## What it takes and gives",
        "",
        f"* `encode_image`: `image` uint8 (1, {spec.height}, {spec.width}, 3) RGB -> `features` (1, {regions}, "
        f"{bundle.model.region_dim(labels)}), `boxes` (1, {regions}, 4) corners 0..1, `scores` (1, {regions}).",
        f"* `answer_<rung>`: those and `input_ids` int32 (1, {bundle.tokenizer.max_tokens}) -> `logits` "
        f"(1, {len(bundle.labels.answers)}), `looked_at` (1, {regions}).",
        "* Resizing is the app's (`preprocess.json`); scaling and normalisation are in the graph. Encode an image once, "
        "then ask any number of questions.",
        f"* Regions scoring below {bundle.model.tee.score_threshold} are ignored by the answer programs.",
        "",
        "## Rungs",
        "",
        "| rung | words read | regions read | words kept | regions kept | GMAC | expected accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for rung in bundle.rungs:
        accuracy = "" if rung.expected_accuracy is None else f"{rung.expected_accuracy:.3f}"
        read = f"{rung.num_words or bundle.tokenizer.max_tokens} | {rung.num_regions or regions}"
        kept = " | ".join(", ".join(map(str, numbers)) or "all" for numbers in (rung.words, rung.regions))
        lines.append(f"| {rung.name} | {read} | {kept} | {rung.gmacs:.4f} | {accuracy} |")
    if governor is not None:
        lines += ["", "## Governor", "", _promise(governor), "How to use `governor.json`: docs/governor.md of edgevlm."]
    lines += ["", "## Files", "", "| target | precision | MB | how | written by |", "|---|---|---|---|---|"]
    for model in bundle.models:
        tools = ", ".join(f"{name} {version}" for name, version in model.tools.items())
        lines.append(f"| {model.target} | {model.precision} | {model.size_mb:.2f} | {model.scheme} | {tools} |")
    for failure in bundle.failures:
        lines.append(f"| {failure.target} | {failure.precision} | | not exported: {failure.reason} | |")
    lines += ["", "## Accuracy of the PyTorch model", ""]
    lines += [f"* {name}: {value:.4f}" for name, value in bundle.metrics.items()] or ["No metrics were recorded."]
    lines += [
        "",
        "The exported files' own accuracy, and what each figure rests on, is in the parity report of the run.",
        "",
        "## Data",
        "",
        f"Trained on {origin.dataset or 'a dataset that was not recorded'}, seed {origin.seed}. Classes: "
        f"{', '.join(bundle.labels.classes)}. Answers: {', '.join(bundle.labels.answers)}. Answers outside this list "
        "cannot be given, and a question about anything else is answered all the same.",
        "",
    ]
    return "\n".join(lines)


def _promise(governor: Governor) -> str:
    if not governor.certified:
        return "`governor.json` could not certify any rung below the full one: every question goes to the full rung."
    return (
        f"`governor.json` starts low and climbs while an answer is not sure enough. Against the full rung it loses at most "
        f"{governor.epsilon:g} of the score, with probability {1 - governor.delta:g} over the data it was calibrated on."
    )
