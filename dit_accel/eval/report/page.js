"use strict";
// Shows two samples of one prompt over each other with a movable border, and runs all videos of a prompt on one clock.
// Without scripts the page shows the grid of samples, each with its own controls.

const DRIFT = 0.08; // seconds two videos may be apart

function compare(article) {
  const box = article.querySelector(".compare");
  const samples = [...article.querySelectorAll(".grid [data-row]")];
  if (samples.length < 2) return;
  const stage = box.querySelector(".stage");
  const border = box.querySelector(".border");
  const choices = [box.querySelector(".left"), box.querySelector(".right")];

  for (const [side, choice] of choices.entries()) {
    for (const [index, sample] of samples.entries()) choice.add(new Option(sample.dataset.row, index));
    choice.value = side && Math.max(1, samples.findIndex((sample) => "chosen" in sample.dataset));
    stage.append(shown(samples[choice.value]));
    choice.addEventListener("change", () => {
      const old = stage.children[side];
      const next = shown(samples[choice.value]);
      if (next.tagName === "VIDEO") next.addEventListener("loadedmetadata", () => { next.currentTime = player.now(); });
      old.replaceWith(next);
      if (player.playing()) player.start();
    });
  }
  border.addEventListener("input", () => stage.style.setProperty("--border", border.value + "%"));
  const player = samples[0].tagName === "VIDEO" ? videos(article) : { now: () => 0, playing: () => false };
  box.hidden = false;
}

function shown(sample) {
  const copy = sample.cloneNode();
  copy.controls = false;
  delete copy.dataset.row;
  return copy;
}

function videos(article) {
  const bar = article.querySelector(".player");
  const button = bar.querySelector(".play");
  const time = bar.querySelector(".time");
  const clips = () => [...article.querySelectorAll("video")];
  let on = false;
  for (const clip of clips()) clip.controls = false;

  function show() {
    button.textContent = on ? "Pause" : "Play";
    button.setAttribute("aria-pressed", on);
  }
  function tick() {
    if (!on) return;
    const [lead, ...others] = clips();
    for (const clip of others) {
      if (Math.abs(lead.currentTime - clip.currentTime) > DRIFT && !clip.seeking) clip.currentTime = lead.currentTime;
    }
    if (lead.duration) time.value = 1000 * lead.currentTime / lead.duration;
    requestAnimationFrame(tick);
  }
  async function start() {
    on = true;
    show();
    await Promise.all(clips().map((clip) => clip.play()));
    tick();
  }
  function stop() {
    on = false;
    show();
    for (const clip of clips()) clip.pause();
  }
  button.addEventListener("click", () => (on ? stop() : start()));
  time.addEventListener("input", () => {
    stop();
    for (const clip of clips()) if (clip.duration) clip.currentTime = (time.value / 1000) * clip.duration;
  });
  bar.hidden = false;
  return { now: () => clips()[0].currentTime, playing: () => on, start };
}

document.querySelectorAll(".prompt").forEach(compare);
