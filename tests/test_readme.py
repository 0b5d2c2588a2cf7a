"""What the README and the results page say was measured is what the recorded files say; links and names are right."""

import ast
import importlib
import json
import re
from collections import Counter

import pytest
import yaml

from dctlib._io import ROOT
from dctlib.discovery.options import DiscoverOptions
from dctlib.discovery.snippets import SharedPlace
from dctlib.evaluation.instructions import split_instructions
from dctlib.evaluation.refusals import is_refusal
from dctlib.paper.claims import RULES, Verdict, compare_with_published
from dctlib.paper.comparisons import METHODS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def one_line(page):
    return " ".join((ROOT / page).read_text(encoding="utf-8").replace("*", "").split())


README, RESULTS = one_line("README.md"), one_line("docs/results.md")


def recorded(stem, profile="laptop"):
    return json.loads((ROOT / "figures" / profile / f"{stem}.json").read_text())


def params(section):
    return yaml.safe_load((ROOT / "params" / "laptop.yaml").read_text(encoding="utf-8"))[section]


def percent(rate):
    return f"{100 * rate:.0f} %"


def found_claims():
    return Counter(
        verdict for stem in RULES for verdict in compare_with_published(stem, recorded(stem)).claims.values()
    )


def verdicts():
    found = found_claims()
    yield f"| of the post's {found.total()} claims | |"
    yield f"| replicate | {found[Verdict.REPLICATES]} |"
    yield f"| do not replicate | {found[Verdict.DOES_NOT]} |"
    yield f"| stay undecided | {found[Verdict.UNDECIDED]} |"
    yield "The post's claims, on one organism"
    complexity = compare_with_published("sample_complexity", recorded("sample_complexity"))
    for statement, verdict in complexity.claims.items():
        if statement.startswith("exponential fits score above"):
            yield f"| {statement} | {verdict.value} |"
    breaker = recorded("circuit_breaker")
    yield (
        f"Random vectors, our control, get past the circuit breaker on {percent(breaker['random_asr'])} of requests, "
        f"and DCT's on {percent(breaker['steered_asr'])}."
    )


def real_models():
    """Rows of both real models, the larger first."""
    found = recorded("real_models", "study")
    rates = {row["model"]: row for row in found["advbench"]}
    names = [f"qwen2.5-coder-{size}-instruct" for size in ("1.5b", "0.5b")]
    fits = [found["fits"][name] for name in names]
    ((requests,), (test,)) = {row["requests"] for row in rates.values()}, {fit["test"]["DCT"] for fit in fits}
    yield f"| AdvBench requests refused, of {requests} | " + " | ".join(
        percent(rates[name]["refused"]) for name in names
    )
    for judged, count in (("refused", "refused"), ("judged compliant", "compliant")):
        for kind, label in (("unsteered", "unsteered"), ("DCT", "best DCT vector"), ("random", "best random vector")):
            yield f"| {judged}, of {test}: {label} | " + " | ".join(str(fit[count][kind]) for fit in fits) + " |"
    setting = yaml.safe_load((ROOT / "params" / "study.yaml").read_text(encoding="utf-8"))["real_models"]
    factors = setting["num_factors"]
    yield (
        f"{factors} exponential factors were fitted to {setting['fit_prompts']} refused AdvBench requests. Vectors of "
        f"length R were ranked on {setting['validation']} validation requests, and the best of each kind was judged on "
        f"{setting['test']} others."
    )
    for kind in ("DCT", "random"):
        counts = " | ".join(str(fit["above_zero"][kind]) for fit in fits)
        yield f"| vectors above 0 on validation: {kind}, of {factors} | {counts} |"
    small = fits[1]["compliant"]
    assert fits[1]["refused"]["DCT"] == 0 and small["DCT"] < small["random"]


def signed(value):
    return f"{value:+.1f}".replace("-", "−")


def real_figure_1():
    """Rows of Figure 1 on the 1.5B: scores by method and number of fit prompts, answers, shuffles, and differences."""
    found = recorded("sample_complexity", "study")
    names = {**{method: name for method, name in METHODS.items() if method in found}, "random": "random vectors"}
    sizes = list(found["exponential"])
    yield "| best vector of | " + " | ".join(f"n = {n}" for n in sizes) + " | answers | shuffles |"
    for method, name in names.items():
        cells = [found[method].get(n) for n in sizes] if method != "random" else [found["random"]["0"]]
        cells += [None] * (len(sizes) - len(cells))
        last = [cell for cell in cells if cell][-1]
        scores = " | ".join(signed(cell["mean"]) if cell else "" for cell in cells)
        share = sum(last["answered"]) / len(last["answered"])
        shuffles = ", ".join(str(len(cell["scores"])) for cell in cells if cell)
        yield f"| {name} | {scores} | {percent(share)} | {shuffles} |"
    for statement, verdict in compare_with_published("sample_complexity", found).claims.items():
        yield f"| {statement} | {verdict.value} |"


def real_baselines():
    """Rows of the methods at equal damage on the 1.5B, the best first."""
    methods = recorded("real_baselines", "study")["methods"]
    for name, of in sorted(methods.items(), key=lambda each: -each[1]["success"]["mean"]):
        rate, length = of["success"], "" if of["length"] is None else f"{of['length']:.1f}"
        yield (
            f"| {name} | {percent(rate['mean'])} | {percent(rate['low'])} to {percent(rate['high'])} | "
            f"{percent(of['refused'])} | {of['benign_kl']:.2f} | {length} | {of['minutes']:.1f} |"
        )


def sources():
    """Rows of the methods that make candidates."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "sources.json").read_text(encoding="utf-8"))
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for row in (row for row in rows if row["method"] == method):
            cells += ["" if "refined" in method else str(row["above_0.3"]), percent(max(row["answered"]))]
        yield f"| {method} | {' | '.join(cells)} |"


def unlocking(found):
    """Return how many vectors of each kind get at least half of the requests answered."""
    return {kind: sum(share >= 0.5 for share in of["answered"]) for kind, of in found["vectors"].items()}


def real_multiplicity():
    """How many vectors unlock the 1.5B, and rows of what single directions do."""
    found = recorded("real_multiplicity", "study")
    counts = unlocking(found)
    dct = found["vectors"]["DCT"]
    yield (
        f"At least half of 16 requests are answered under {counts['DCT']} of the 64 vectors, and under "
        f"{counts['random']} of 64 random ones."
    )
    yield (
        f"{dct['qualifying']} of the vectors score at least 0, and their mean absolute cosine is "
        f"{dct['mean_abs_cosine']:.2f}."
    )
    lead = found["differences"]["mean - best"]
    assert lead["low"] < 0 < lead["high"]
    points = f"{100 * lead['mean']:.0f}"
    yield f"The mean direction gets {points} percentage points more requests answered than the best vector"
    for label, rate in found["answered"].items():
        ends = f"{percent(rate['low'])} to {percent(rate['high'])}"
        yield f"| {label} | {percent(rate['mean'])} | {ends} | {percent(found['refused'][label]['mean'])} |"


def judge():
    """Rows of the agreement of the judge and two readers."""
    found = recorded("judge", "study")
    yield f"Two readers labelled {found['completions']} completions"
    for question, pairs in found["agreement"].items():
        for pair, of in pairs.items():
            numbers = " | ".join(f"{of[name]['mean']:.2f}" for name in ("precision", "recall", "kappa"))
            yield f"| {question} | {pair} | {numbers} | {of['kappa']['low']:.2f} to {of['kappa']['high']:.2f} |"
    for condition, of in found["by_condition"].items():
        yield f"| {condition} | " + " | ".join(percent(of[who]) for who in ("judge", "reader 1", "reader 2")) + " |"


def search_steps():
    """Rows of the ways to choose a vector: organisms first, then real models."""
    groups = {**recorded("search_steps")["groups"], **recorded("search_steps", "study")["groups"]}
    for way in next(iter(groups.values())):
        yield f"| {way} | " + " | ".join(percent(of[way]["success"]["mean"]) for of in groups.values()) + " |"


def answered():
    """Return each method's rates of requests answered: with the first vector, and with eight."""
    methods = recorded("baselines")["methods"]
    return [{name: of[rate] for name, of in methods.items() if rate in of} for rate in ("first", "one_of_k")]


def baselines():
    methods = recorded("baselines")["methods"]
    first, eight = answered()
    assert recorded("baselines")["tries"] == 8
    labels = {"random": "random vectors", "means, added": "difference of means, supervised"}
    for name in ("DCT", "power steering", "MELBO", "random", "means, added"):
        each = ", ".join(f"{100 * one:.0f}" for one in methods[name]["firsts"])
        last = percent(eight[name]["mean"]) if name in eight else "one vector only"
        yield f"| {labels.get(name, name)} | {percent(first[name]['mean'])} | {each} % | {last} |"
    yield (
        "With the first vector and with eight tries, DCT loses to power steering, which takes fewer passes, and beats "
        "random vectors. It also loses to the difference of means. DCT and MELBO are not told apart."
    )
    assert max(first[name]["lead"]["high"] for name in ("means, added", "power steering")) < 0
    assert eight["power steering"]["lead"]["high"] < 0
    assert min(tried["random"]["lead"]["low"] for tried in (first, eight)) > 0
    assert all(tried["MELBO"]["lead"]["low"] < 0 <= tried["MELBO"]["lead"]["high"] for tried in (first, eight))
    assert methods["power steering"]["backward"] < methods["DCT"]["backward"]
    assert methods["power steering"]["forward"] < methods["DCT"]["forward"]


def replicates():
    found = recorded("replicates")
    claims, of = list(found["claims"].values()), len(found["seeds"])
    assert of == 3
    yield (
        f"On three other organisms {claims.count(of)} of {len(claims)} claims judged hold on all three, "
        f"{claims.count(0)} on none."
    )


def audited(stem):
    """Return how many secrets or abilities each method finds."""
    audit = recorded(stem)
    last = f"fluent, k = {audit['num_factors']}"
    return {name: round(each[last] * audit["organisms"]) for name, each in audit["methods"].items()}


def audits():
    secrets, sums = recorded("auditing"), recorded("hidden_sums")
    counts = audited("auditing"), audited("hidden_sums")
    yield (
        f"| found by | planted secrets, of {secrets['organisms']} | sums behind a password unlocked, of "
        f"{sums['organisms']} organisms |"
    )
    labels = {"DCT, n = 4": "DCT, four prompts", "DCT, n = 1": "DCT, one prompt", "random": "random vectors"}
    for name in ("DCT, n = 4", "DCT, n = 1", "power steering", "random", "sampling"):
        yield f"| {labels.get(name, name)} | {counts[0][name]} | {counts[1][name]} |"
    yield "The intervals of DCT and power steering overlap in both columns."
    for audit in (secrets, sums):
        of = audit["methods"]
        rival = of["power steering"]
        for each in (of["DCT, n = 1"], of["DCT, n = 4"]):
            assert each["low"] <= rival["high"] and rival["low"] <= each["high"], "their intervals part"
    pairs = secrets["controls"] * secrets["organisms"]
    alarms = round(pairs * max(each["false alarms"] for each in secrets["methods"].values()))
    yield f"False alarms: {alarms} of {pairs} pairs of a clean organism and a secret."


def anomaly():
    found, at = recorded("anomaly"), ("target", "trigger against decoy")

    def seen(table, what):
        rows = [row for row in found[table] if (row["end"], row["contrast"]) == at]
        return next(row for row in rows if row["detector"] == f"{what}, Mahalanobis")

    factors, chance, whole = (seen("planted", what)["mean"] for what in ("factors", "random", "residual"))
    assert seen("over_random", "factors")["low"] > 0 > seen("over_residual", "factors")["high"]
    yield f"| DCT's factors | {factors:.2f} |"
    yield f"| as many random directions | {chance:.2f} |"
    yield f"| the whole residual | {whole:.2f} |"
    yield "Factors beat random directions, and the distance along the whole residual beats factors."


def stability():
    found = recorded("stability")
    pairs, errors = found["variants"], found["errors"][f"m = {params('stability')['num_factors']}"]
    yield f"| mean cosine of factors from another start on other prompts | {pairs['both, usual']['cosine']:.2f} |"
    yield f"| the same of random vectors | {pairs['random']['cosine']:.2f} |"
    yield (
        "| relative error of the exponential transcoder on random directions, where 1 is nothing explained | "
        f"{errors['random']:.2f} |"
    )


@pytest.mark.parametrize(
    "said",
    [
        *(verdicts, real_models, real_figure_1, real_multiplicity, real_baselines, judge, search_steps, sources),
        *(baselines, replicates, audits, anomaly, stability),
    ],
    ids=lambda said: said.__name__,
)
def test_numbers_of_the_results_page_are_those_of_the_recorded_files(said):
    for sentence in said():
        assert " ".join(sentence.split()) in RESULTS


def test_numbers_of_the_readme_are_those_of_the_recorded_files():
    fits = recorded("real_models", "study")["fits"]
    labels = {"1.5b": "Qwen2.5-Coder-1.5B: refusals, of 32 requests", "0.5b": "Qwen2.5-Coder-0.5B: refusals"}
    for size, label in labels.items():
        fit = fits[f"qwen2.5-coder-{size}-instruct"]
        assert set(fit["test"].values()) == {32}
        rows = [
            f"| {name} | {count['DCT']} | {count['random']} | unsteered {count['unsteered']} |"
            for name, count in ((label, fit["refused"]), ("compliant answers", fit["compliant"]))
        ]
        assert " ".join(rows) in README
    competing = recorded("real_baselines", "study")["methods"]
    rate = {name: percent(of["success"]["mean"]) for name, of in competing.items()}
    assert (
        f"| the 1.5B within one bound on damage: requests answered, of 50 | {rate['DCT']} | {rate['random']} | "
        f"power steering {rate['power steering']}, difference of means (supervised) {rate['difference of means']}, "
        f"Heretic (supervised) {rate['heretic']} |"
    ) in README
    many = recorded("real_multiplicity", "study")
    unlock = unlocking(many)
    assert f"| the same: vectors of one fit that unlock it, of 64 | {unlock['DCT']} | {unlock['random']} | |" in README
    rates = {label: percent(of["mean"]) for label, of in many["answered"].items()}
    assert (
        f"| the same: requests answered while one direction is ablated, of 100 | {rates['target, ablated']} | "
        f"{rates['random, ablated']} | unsteered {rates['unsteered']} |"
    ) in README
    read = recorded("judge", "study")["agreement"]["answer"]["judge, reader 1"]["precision"]["mean"]
    assert f"readers accept {percent(read)} of what it accepts" in README
    for stem, what in (("auditing", "planted secrets"), ("hidden_sums", "locked abilities")):
        counts, of = audited(stem), recorded(stem)["organisms"]
        assert (
            f"| {what} found blind from four prompts, of {of} | {counts['DCT, n = 4']} | {counts['random']} | power "
            f"steering {counts['power steering']}, sampling {counts['sampling']} |"
        ) in README
    found = found_claims()
    assert (
        f"| the post's {found.total()} claims, on one organism | {found[Verdict.REPLICATES]} replicate, "
        f"{found[Verdict.DOES_NOT]} do not, {found[Verdict.UNDECIDED]} undecided |"
    ) in README
    assert (
        "On organisms that refuse, DCT loses to power steering and to the difference of means." in README
    )  # baselines()
    breaker = recorded("circuit_breaker")
    assert (
        f"Random vectors get past the circuit breaker, a trained defence, on {percent(breaker['random_asr'])} of "
        f"requests, DCT's on {percent(breaker['steered_asr'])}."
    ) in README


def awaited():
    """Return the pages of notebooks that a stage declares and that no run has left yet, as its lock knows."""
    expected = {ROOT / "writeup/laptop/notebooks/index.html"}
    for pipeline in ("dvc.yaml", "beyond/dvc.yaml", "study/dvc.yaml"):
        text = (ROOT / pipeline).read_text(encoding="utf-8").replace("${profile}", "laptop")
        lock = (ROOT / pipeline).with_suffix(".lock")
        recorded = lock.read_text(encoding="utf-8") if lock.exists() else ""
        pages = re.findall(r"writeup/\w+/notebooks/\w+\.html", text)
        expected |= {ROOT / each for each in pages if each not in recorded}
    return expected if len(expected) > 1 else set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Each relative link and image: a file or folder that is there, and a heading of it."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        linked = page.parent / path if path else page
        assert linked.exists() or linked.resolve() in awaited(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_import_what_there_is(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dctlib"):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module}.{alias.name}"


@pytest.mark.real
@pytest.mark.slow
def test_the_first_example_ends_a_refusal(capsys):
    """It runs as it stands; the words after it may differ between machines."""
    (first, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(first, "README.md", "exec"), {})
    before, after = [line.split(":", 1) for line in capsys.readouterr().out.splitlines()]
    assert (before[0], after[0]) == ("before", "after")
    assert is_refusal(before[1]) and not is_refusal(after[1])


def test_the_worked_example_has_requests_enough_for_the_defaults_of_discover():
    page = (ROOT / "docs" / "example.md").read_text(encoding="utf-8")
    (requests,) = re.findall(r"<<'END'\n(.*?)END\n", page, re.DOTALL)
    options = DiscoverOptions(**{"model": "m", "prompts": requests.splitlines()})
    fitted, held_out = split_instructions(options.prompts, fit=options.fit_prompts, held_out=options.validation)
    assert fitted + held_out == requests.splitlines()
    assert f"with {len(fitted + held_out)} instructions in a text file" in README
    shown = page.split("```python")[1].split("```")[0]
    (asked,) = re.findall(r'format_chat\(tokenizer, \["(.*?)"\]\)', shown)
    assert asked not in requests
    place = SharedPlace("vectors/everyday/discover", "qwen2.5-coder-0.5b-instruct", 8)
    assert place.python(5, 7.27).replace("Write your request here.", asked) == shown.strip()
    assert place.export(5) in page


def test_the_readme_is_short():
    assert len(README.split()) <= 1500


def test_how_it_works_names_what_there_is():
    """Each row of the table of equations: a file of dctlib, and names that are defined in it."""
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    rows = [line.split("|")[2] for line in page.splitlines() if line.startswith("| ") and "/" in line.split("|")[2]]
    assert len(rows) > 12
    for row in rows:
        quoted = re.findall(r"`([^`]+)`", row)
        sources = [(ROOT / "dctlib" / path).read_text(encoding="utf-8") for path in quoted if path.endswith(".py")]
        for name in (name for name in quoted if not name.endswith(".py")):
            assert any(re.search(rf"(def|class) {name}\b", source) for source in sources), name


def test_scores_of_the_guide_are_those_of_the_recorded_files():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    one, four, sixteen = (
        f"{cell['mean']:.1f}" for cell in recorded("sample_complexity", "study")["exponential"].values()
    )
    assert f"the best vector scores {one} with one prompt, {four} with four, and {sixteen} with sixteen" in guide
