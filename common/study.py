"""The human evaluation of REG: a page that asks people to click on what a sentence means, and the score of their clicks.

Huang et al. (arXiv 2211.07919, Table 2): two people click for each of 100 generated sentences a split; a sentence counts
when both clicks lie in its object's mask. `write_page` makes one file that works without a network, on a phone as well;
it knows the pictures and the sentences, not the answers. Each person saves a file of clicks, and `score` takes two.
"""
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from common import data, pictures
from common.config import UserError, write_text

SIDE, QUALITY = 800, 75  # of the embedded pictures: longer side in pixels, JPEG quality
MAX_BYTES = 16 << 20


def draw(rows, count, seed=0):
    """`count` of the rows in random order, or all of them where there are fewer; a pure function of its arguments."""
    return [rows[i] for i in np.random.default_rng((seed, 2)).permutation(len(rows))[:count]]


def write_page(path, rows, dataset, checkpoint=""):
    """Write the page for these rows of `reg.evaluate`. Raises UserError when it cannot be written; returns the study's id."""
    items = [[row["ref_id"], row["image_id"], row["sentence"]] for row in rows]
    study = hashlib.sha256(json.dumps([dataset.name, dataset.split, items]).encode()).hexdigest()[:16]
    escape, cards = pictures.escape, []
    for row in rows:
        image = int(dataset.expression_image[row["index"]])
        width, height = map(int, dataset.sizes[image])
        photo = pictures.data_uri(dataset.picture(image).permute(1, 2, 0).numpy(), QUALITY, SIDE)
        sentence = escape(row["sentence"] or "(no sentence was made)", 1000)
        cards.append(f'<article class="item" hidden data-ref="{row["ref_id"]}" data-image="{row["image_id"]}" '
                     f'data-width="{width}" data-height="{height}"><p class="sentence" dir="auto">{sentence}</p>'
                     f'<div class="photo" style="--ratio:{width / height:.4f}"><img src="{photo}" alt="" draggable="false" '
                     f'width="{width}" height="{height}" decoding="async"><i class="mark" hidden></i></div></article>')
    body = f"""<style>{STYLE}</style>
<section id="study" data-id="{study}" data-dataset="{escape(dataset.name)}" data-split="{escape(dataset.split)}"
 data-checkpoint="{escape(str(checkpoint))}">
<header><button id="back" type="button">Back</button><progress max="{len(rows)}" value="0"></progress><output></output></header>
<article id="start"><h1>What does the sentence mean?</h1><p>You will see {len(rows)} pictures, each with a sentence. Click on the
object that the sentence means; the next picture then comes by itself. Where you cannot tell, say so: a guess helps nobody. You
may go back, and stop and go on later in the same browser.</p><p><button id="begin" type="button">Begin</button></p></article>
{"".join(cards)}
<p id="unsure" hidden><button type="button">I cannot tell</button></p>
<article id="end" hidden><h1>Thank you</h1><p>Save your clicks and send the file to who gave you this page.
Nothing is sent by itself.</p><p><a id="save" class="button" href="#">Save the clicks</a></p>
<p>If your browser saves no file, copy this text instead:</p>
<textarea readonly rows="6" aria-label="the clicks as text"></textarea>
<p><button id="again" type="button">Begin anew, as another person</button></p></article>
</section>
<noscript><p>This page needs JavaScript.</p></noscript>"""
    write_text(path, pictures.page(f"{len(rows)} sentences, {dataset.name} {dataset.split}", body, SCRIPT))
    return study


# ---- scoring ------------------------------------------------------------------------------------------------

def read_clicks(path):
    """A saved file, checked: study, rater, dataset, split, checkpoint, and clicks {ref_id: (x, y) or None}. Raises UserError."""
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise ValueError("it is larger than any file of clicks")
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        clicks = {}
        for click in saved["clicks"]:
            x, y = click["x"], click["y"]
            if type(click["ref_id"]) is not int or click["ref_id"] in clicks:
                raise ValueError("a ref_id is no number or stands there twice")
            if (x, y) != (None, None) and not all(type(v) in (int, float) and math.isfinite(v) for v in (x, y)):
                raise ValueError(f"ref {click['ref_id']} has a click that is no place")
            clicks[click["ref_id"]] = None if x is None else (x, y)
        names = {name: saved[name] for name in ("study", "rater", "dataset", "split")}
        if not all(isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w+.-]{0,63}", name) for name in names.values()):
            raise ValueError("study, rater, dataset and split should be names")
        return names | {"checkpoint": str(saved.get("checkpoint", "")), "clicks": clicks}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        what = error.strerror if isinstance(error, OSError) else f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path} is no file of clicks that the study's page saved: {what}.") from None


def hit(mask, click):
    """Whether a click (x, y) in image pixels lies in a mask (H,W) bool: None does not, the far border is the last pixel."""
    if click is None:
        return False
    height, width = mask.shape
    x, y = click
    if not (0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"({x}, {y}) lies outside a picture of {width} x {height}")
    return bool(mask[min(int(y), height - 1), min(int(x), width - 1)])


def score(first, second, data_root):
    """Score two people's files of one study: {dataset split n both first second …} in percent, and a row for each sentence.

    A sentence counts (`both`) when both clicks lie in the mask of its ref's object, in the split below `data_root`.
    Raises UserError where the files are of different studies, of one person, or fit no ref of the split.
    """
    files = [read_clicks(first), read_clicks(second)]
    for name, several in (("study", "studies"), ("dataset", "corpora"), ("split", "splits")):
        if files[0][name] != files[1][name]:
            raise UserError(f"{first} and {second} are of different {several}: {files[0][name]} and {files[1][name]}.")
    if files[0]["rater"] == files[1]["rater"]:
        raise UserError(f"{first} and {second} were saved by the same person; the score needs two.")
    if files[0]["clicks"].keys() != files[1]["clicks"].keys() or not files[0]["clicks"]:
        raise UserError(f"{first} and {second} are not about the same sentences; let both people finish the page.")
    path = data.split_path(data_root, files[0]["dataset"], files[0]["split"])
    dataset = data.RefDataset(path, None, None)
    position = {int(ref): e for e, ref in reversed(list(enumerate(dataset.ref_ids)))}
    rows = []
    for ref in files[0]["clicks"]:
        if ref not in position:
            raise UserError(f"{path} has no ref {ref}, which {first} has clicks for; is it the corpus that the study is about?")
        mask = dataset.expression_mask(position[ref])
        try:
            hits = [hit(mask, file["clicks"][ref]) for file in files]
        except ValueError as error:
            raise UserError(f"{first} or {second}, ref {ref}: the click {error}.") from None
        rows.append({"ref_id": ref, "image_id": int(dataset.image_ids[dataset.expression_image[position[ref]]]), "hits": hits})
    percent = lambda values: round(100 * float(np.mean(values)), 4)  # noqa: E731
    return {"study": files[0]["study"], "checkpoint": files[0]["checkpoint"], "dataset": dataset.name, "split": dataset.split,
            "task": "human study", "n": len(rows), "both": percent([all(row["hits"]) for row in rows]),
            "first": percent([row["hits"][0] for row in rows]), "second": percent([row["hits"][1] for row in rows]), "rows": rows}


def scored(first, second, data_root):
    """`score`, written beside the first file; returns what to print."""
    result = score(first, second, data_root)
    out = Path(first).with_name(f"study_{result['dataset']}_{result['split']}_{result['study']}.json")
    write_text(out, json.dumps(result, indent=1))
    return (f"{result['dataset']} {result['split']}: {result['both']:.1f} % of {result['n']} sentences led both people to the "
            f"object ({result['first']:.1f} % the first, {result['second']:.1f} % the second)\nwritten to {out}")


# ---- the page -----------------------------------------------------------------------------------------------

STYLE = """
main{max-width:1000px;padding:.6rem .8rem 1rem}#study header{flex-wrap:nowrap;align-items:center;gap:.8rem}
progress{flex:1;min-width:3rem;accent-color:var(--accent)}article{margin:0 0 .8rem}#start,#end{max-width:40rem;margin-top:1.5rem}
.item .sentence{font-size:1.35rem;margin:.6rem 0;min-height:2.6rem;display:flex;align-items:center}
.photo{position:relative;width:min(100%,calc(max(100vh - 13rem,18rem)*var(--ratio)))}
.photo img{cursor:crosshair;touch-action:manipulation;user-select:none;-webkit-user-select:none}
.mark{position:absolute;width:22px;height:22px;margin:-11px 0 0 -11px;border:3px solid #fff;border-radius:50%;
background:rgb(232 93 36/.75);box-shadow:0 0 0 2px #000;pointer-events:none}
button,.button{font:inherit;display:inline-block;padding:.5rem 1.1rem;border:1px solid var(--line);border-radius:8px;
cursor:pointer;background:var(--card);color:inherit;text-decoration:none}button:disabled{opacity:.4;cursor:default}
#begin,#save{background:var(--accent);color:var(--bg);border-color:var(--accent)}
textarea{width:100%;font:13px/1.4 ui-monospace,monospace;background:var(--card);color:inherit;border:1px solid var(--line)}
"""

SCRIPT = """
const study = document.getElementById('study'), items = [...document.querySelectorAll('.item')];
const by = id => document.getElementById(id), key = 'study ' + study.dataset.id;
const fresh = () => ({rater: [...crypto.getRandomValues(new Uint8Array(8))].map(b => b.toString(16).padStart(2, '0')).join(''),
  clicks: {}, at: -1});
let state = fresh(), busy = false;
try {
  const old = JSON.parse(localStorage.getItem(key));
  if (old?.rater && old.clicks) state = old;
} catch {}
const keep = () => { try { localStorage.setItem(key, JSON.stringify(state)); } catch {} };
function saved() {
  const {id, dataset, split, checkpoint} = study.dataset;
  const clicks = items.map(item => {
    const [x, y] = state.clicks[item.dataset.ref] || [null, null];
    const sentence = item.querySelector('.sentence').textContent;
    return {ref_id: +item.dataset.ref, image_id: +item.dataset.image, sentence, x, y};
  });
  return JSON.stringify({study: id, dataset, split, checkpoint, rater: state.rater, clicks}, null, 1);
}
function mark(item) {
  const dot = item.querySelector('.mark'), click = state.clicks[item.dataset.ref];
  dot.hidden = !click;
  if (click) {
    dot.style.left = 100 * click[0] / item.dataset.width + '%';
    dot.style.top = 100 * click[1] / item.dataset.height + '%';
  }
}
function show(at) {
  state.at = Math.max(-1, Math.min(at, items.length));
  keep();
  items.forEach((item, i) => { item.hidden = i !== state.at; if (i === state.at) mark(item); });
  by('start').hidden = state.at >= 0;
  by('end').hidden = state.at < items.length;
  by('unsure').hidden = state.at < 0 || state.at === items.length;
  by('back').disabled = state.at <= 0;
  study.querySelector('progress').value = Math.max(0, state.at);
  study.querySelector('output').textContent = state.at < 0 ? '' : Math.min(state.at + 1, items.length) + ' of ' + items.length;
  if (state.at === items.length) study.querySelector('textarea').value = saved();
}
function answer(click) {
  if (busy) return;
  busy = true;
  state.clicks[items[state.at].dataset.ref] = click;
  mark(items[state.at]);
  keep();
  setTimeout(() => { busy = false; show(state.at + 1); }, click ? 350 : 0);
}
for (const item of items) item.querySelector('img').addEventListener('click', event => {
  const box = event.target.getBoundingClientRect(), width = +item.dataset.width, height = +item.dataset.height;
  const place = (at, low, size, whole) => Math.round(100 * Math.max(0, Math.min(whole, (at - low) / size * whole))) / 100;
  answer([place(event.clientX, box.left, box.width, width), place(event.clientY, box.top, box.height, height)]);
});
by('begin').addEventListener('click', () => show(0));
by('back').addEventListener('click', () => { if (!busy) show(state.at - 1); });
by('unsure').addEventListener('click', () => answer(null));
by('again').addEventListener('click', () => { state = fresh(); show(-1); });
study.querySelector('textarea').addEventListener('focus', event => event.target.select());
by('save').addEventListener('click', event => {
  event.target.download = `clicks_${study.dataset.dataset}_${study.dataset.split}_${state.rater}.json`;
  event.target.href = URL.createObjectURL(new Blob([saved()], {type: 'application/json'}));
});
show(state.at);
"""
