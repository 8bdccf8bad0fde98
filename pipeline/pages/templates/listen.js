const one = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const TOP = 10, ROWS = 8, BLINK = 250;

function tell(text, wrong = false) {
  one("state").textContent = text;
  one("state").classList.toggle("wrong", wrong);
}

/* The model: (samples,) at its rate → (classes,) probabilities. One sound at a time goes through it. */

async function load() {
  if (typeof WebAssembly !== "object") throw new Error("this browser has no WebAssembly, which computes the tags; use a newer one");
  const about = await (await fetched("model.json")).json();
  const runtime = await import("runtime").catch(() => {
    throw new Error(`ONNX Runtime Web ${about.runtime.version} could not be loaded from ${new URL(about.runtime.script, location)}, or is not the file that this page was made for`);
  });
  runtime.env.wasm.numThreads = 1; // more need headers that not every server sends
  runtime.env.wasm.wasmBinary = await (await fetched(about.runtime.wasm, about.runtime.wasm_integrity)).arrayBuffer();
  const weights = await (await fetched("model.onnx", about.integrity)).arrayBuffer();
  const session = await runtime.InferenceSession.create(weights, { executionProviders: ["wasm"] });
  let busy = Promise.resolve();
  const run = async (samples) => {
    const padded = new Float32Array(Math.max(samples.length, about.shortest_samples));
    padded.set(samples);
    const found = await session.run({ waveforms: new runtime.Tensor("float32", padded, [1, padded.length]) });
    return found.probabilities.data;
  };
  return { about, hear: (samples) => (busy = busy.catch(() => null).then(() => run(samples))) };
}

async function fetched(address, integrity) {
  const answer = await fetch(address, integrity ? { integrity } : {}).catch(() => null);
  if (!answer || !answer.ok) throw new Error(`${new URL(address, location)} can't be had, or is not the file that this page was made for`);
  return answer;
}

/* Sounds: decoded by the browser at their own rate, then resampled here, as `pipeline tag` does it. */

async function decode(bytes, rate) {
  const own = rateOf(new DataView(bytes)), sound = await new OfflineAudioContext(1, 1, own).decodeAudioData(bytes);
  const samples = new Float32Array(sound.length);
  for (let channel = 0; channel < sound.numberOfChannels; channel++) {
    sound.getChannelData(channel).forEach((value, index) => { samples[index] += value / sound.numberOfChannels; });
  }
  return resample(samples, own, rate);
}

function rateOf(view) {
  const text = (at, length) => String.fromCharCode(...new Uint8Array(view.buffer, at, Math.min(length, view.byteLength - at)));
  const start = text(0, 200), vorbis = start.indexOf("\x01vorbis"), format = start.indexOf("fmt ");
  if (start.startsWith("fLaC")) return (view.getUint32(18) >>> 12) || 48000;
  if (start.startsWith("OggS")) return vorbis < 0 ? 48000 : view.getUint32(vorbis + 12, true); // Opus is 48 kHz
  if (start.startsWith("RIFF") && format > 0) return view.getUint32(format + 12, true);
  return start.startsWith("ID3") || view.getUint16(0) >>> 5 === 0x7ff ? rateOfMp3(view) : 48000;
}

function rateOfMp3(view) {
  const byte = (at) => view.getUint8(at);
  let at = byte(0) === 0x49 ? 10 + ((byte(6) << 21) | (byte(7) << 14) | (byte(8) << 7) | byte(9)) : 0;
  while (at + 4 < view.byteLength && view.getUint16(at) >>> 5 !== 0x7ff) at++;
  const version = (byte(at + 1) >> 3) & 3, index = (byte(at + 2) >> 2) & 3;
  return index === 3 ? 48000 : [44100, 48000, 32000][index] / { 3: 1, 2: 2, 0: 4, 1: 1 }[version];
}

const PASS = 0.913, DECIBELS = 120; // of the lower Nyquist frequency, and below it: soxr's high quality

const filters = new Map(); // rates → filter

function filterOf(from, to) {
  const divisor = ((a, b) => { while (b) [a, b] = [b, a % b]; return a; })(from, to), up = to / divisor, down = from / divisor;
  const cutoff = Math.min(1, to / from), width = Math.PI * cutoff * (1 - PASS), middle = (cutoff * (1 + PASS)) / 2;
  const half = Math.ceil((DECIBELS - 8) / (2.285 * width) / 2), beta = 0.1102 * (DECIBELS - 8.7);
  const taps = Array.from({ length: up }, (_, phase) => {
    const row = new Float64Array(2 * half);
    for (let tap = 0; tap < 2 * half; tap++) {
      const time = tap - half + 1 - phase / up, share = time / half;
      const sinc = time === 0 ? middle : Math.sin(Math.PI * middle * time) / (Math.PI * time);
      row[tap] = Math.abs(share) > 1 ? 0 : (sinc * bessel(beta * Math.sqrt(1 - share * share))) / bessel(beta);
    }
    return row;
  });
  return { up, down, half, taps };
}

function resample(samples, from, to) {
  if (from === to) return samples;
  const key = `${from}:${to}`;
  if (!filters.has(key)) filters.set(key, filterOf(from, to));
  const { up, down, half, taps } = filters.get(key);
  const out = new Float32Array(Math.round((samples.length * to) / from)), padded = new Float64Array(samples.length + 2 * half);
  padded.set(samples, half);
  for (let index = 0; index < out.length; index++) {
    const place = index * down, first = Math.floor(place / up) + 1, row = taps[place % up];
    let sum = 0;
    for (let tap = 0; tap < row.length; tap++) sum += padded[first + tap] * row[tap];
    out[index] = sum;
  }
  return out;
}

function bessel(x) {
  let sum = 1, term = 1;
  for (let k = 1; term > 1e-14 * sum; k++) { term *= (x / (2 * k)) ** 2; sum += term; }
  return sum;
}

/* What is shown. */

function best(probabilities, count = TOP) {
  return Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a]).slice(0, count);
}

function showTags(list, probabilities, names) {
  list.replaceChildren(...best(probabilities).map((index) => {
    const item = document.createElement("li"), number = document.createElement("b"), name = document.createElement("span");
    const bar = document.createElement("i"), text = document.createElement("em");
    number.textContent = probabilities[index].toFixed(2);
    text.textContent = names[index];
    bar.style.width = `${100 * probabilities[index]}%`;
    name.append(bar, text);
    item.dataset.probability = probabilities[index];
    item.append(number, name);
    return item;
  }));
}

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

class Timeline {
  constructor(names, hop) {
    Object.assign(this, { names, hop, cells: [] });
  }

  add(start, probabilities) {
    this.cells.push({ start, probabilities });
  }

  draw(begin, end) {
    const peaks = new Float32Array(this.names.length);
    const shown = this.cells.filter((cell) => cell.start + this.hop > begin);
    for (const cell of shown) cell.probabilities.forEach((value, index) => { if (value > peaks[index]) peaks[index] = value; });
    const parts = best(peaks, ROWS).flatMap((index) => {
      const name = document.createElement("span"), row = document.createElementNS(SVG, "svg");
      name.textContent = name.title = this.names[index];
      row.setAttribute("viewBox", `0 0 ${end - begin} 1`);
      row.setAttribute("preserveAspectRatio", "none");
      for (const cell of shown) {
        const box = document.createElementNS(SVG, "rect"), height = cell.probabilities[index];
        const shape = { x: cell.start - begin, width: this.hop, y: 1 - height, height };
        for (const [key, value] of Object.entries(shape)) box.setAttribute(key, value);
        row.append(box);
      }
      const cursor = document.createElementNS(SVG, "line");
      cursor.setAttribute("y2", 1);
      row.append(cursor);
      return [name, row];
    });
    const time = document.createElement("div");
    time.className = "time";
    time.append(...[begin, end].map((seconds) => Object.assign(document.createElement("span"), { textContent: clock(seconds) })));
    one("timeline").replaceChildren(...parts, document.createElement("span"), time);
    this.begin = begin;
  }

  moveTo(seconds) {
    for (const cursor of one("timeline").querySelectorAll("line")) for (const end of ["x1", "x2"]) cursor.setAttribute(end, seconds - this.begin);
    const near = (cell) => Math.abs(cell.start + this.hop / 2 - seconds);
    const cell = this.cells.reduce((found, other) => (found && near(found) <= near(other) ? found : other), null);
    if (cell && cell !== this.shown) showTags(one("now"), (this.shown = cell).probabilities, this.names);
  }
}

/* A file. */

let turn = 0; // what an earlier sound still computes is thrown away

async function open(file, { about, hear }) {
  const own = ++turn, rate = about.sample_rate_hz, player = one("player");
  stopMicrophone();
  tell(`Decoding ${file.name} …`);
  let samples;
  try {
    samples = await decode(await file.arrayBuffer(), rate);
  } catch {
    return tell(`${file.name} is no sound that this browser can decode`, true);
  }
  const seconds = samples.length / rate, timeline = new Timeline(about.names, about.hop_seconds);
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(file);
  player.hidden = one("results").hidden = one("whole-part").hidden = false;
  one("whole").replaceChildren();
  one("now-title").textContent = "Now";
  player.ontimeupdate = () => timeline.moveTo(player.currentTime);
  const window = Math.round(about.window_seconds * rate), hop = Math.round(about.hop_seconds * rate);
  if (seconds <= about.longest_whole_seconds) {
    const probabilities = await hear(samples);
    if (own !== turn) return;
    showTags(one("whole"), probabilities, about.names);
  } else one("whole-part").hidden = true;
  let drawn = 0;
  for (let start = 0; start < samples.length; start += hop) {
    const from = Math.max(0, Math.min(start + hop / 2 - window / 2, samples.length - window));
    timeline.add(start / rate, await hear(samples.subarray(from, from + window)));
    if (own !== turn) return;
    if (performance.now() - drawn > BLINK) {
      tell(`Listening to ${file.name}: ${clock(start / rate)} of ${clock(seconds)}`);
      timeline.draw(0, seconds);
      timeline.moveTo(player.currentTime);
      drawn = performance.now();
      await new Promise((resolve) => setTimeout(resolve));
    }
  }
  timeline.draw(0, seconds);
  timeline.moveTo(player.currentTime);
  tell(`${file.name}: ${seconds.toFixed(1)} s heard`);
}

/* The microphone: the last window, once a hop. */

let microphone = null;

function stopMicrophone() {
  if (!microphone) return;
  microphone.stream.getTracks().forEach((track) => track.stop());
  microphone.context.close();
  microphone = null;
  one("microphone").setAttribute("aria-pressed", "false");
  one("microphone").textContent = "Listen to the microphone";
}

async function openMicrophone() {
  if (!navigator.mediaDevices) throw new Error("browsers give it to pages from https: or localhost alone");
  const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
  microphone = { stream, context: new AudioContext() };
  await microphone.context.audioWorklet.addModule("microphone.js");
  const node = new AudioWorkletNode(microphone.context, "blocks", { numberOfOutputs: 0 });
  microphone.context.createMediaStreamSource(stream).connect(node);
  return node;
}

async function listen({ about, hear }) {
  const own = ++turn;
  if (microphone) { stopMicrophone(); return tell("The microphone is off"); }
  one("microphone").disabled = true;
  let node;
  try {
    node = await openMicrophone();
  } catch (error) {
    stopMicrophone();
    return own === turn && tell(`The microphone can't be opened: ${error.message}`, true);
  } finally {
    one("microphone").disabled = false;
  }
  if (own !== turn) return stopMicrophone();
  one("player").pause();
  one("player").hidden = one("whole-part").hidden = true;
  one("results").hidden = false;
  one("microphone").setAttribute("aria-pressed", "true");
  one("microphone").textContent = "Stop listening";
  tell("Listening to the microphone");
  const rate = microphone.context.sampleRate, window = Math.round(about.window_seconds * rate), hop = Math.round(about.hop_seconds * rate);
  const recent = new Float32Array(window), timeline = new Timeline(about.names, about.hop_seconds);
  let heard = 0, due = hop, waiting = false;
  node.port.onmessage = guarded(async ({ data }) => {
    recent.copyWithin(0, data.length);
    recent.set(data, window - data.length);
    heard += data.length;
    if (heard < due || waiting) return; // a slow machine hears fewer windows
    [due, waiting] = [heard + hop, true];
    const end = heard / rate, samples = recent.slice(window - Math.min(window, heard));
    const probabilities = await hear(resample(samples, rate, about.sample_rate_hz));
    waiting = false;
    if (own !== turn) return;
    timeline.add(end - about.hop_seconds, probabilities);
    timeline.cells = timeline.cells.slice(-60);
    timeline.draw(Math.max(0, end - 30), Math.max(30, end));
    timeline.moveTo(end - about.hop_seconds / 2);
  });
}

const guarded = (work) => (...given) => work(...given).catch((error) => tell(`This sound can't be tagged: ${error.message}`, true));

try {
  tell("Loading the model …");
  const model = await load(), hearFile = guarded((file) => open(file, model));
  one("file").disabled = one("microphone").disabled = false;
  one("file").addEventListener("change", ({ target }) => target.files.length && hearFile(target.files[0]));
  one("microphone").addEventListener("click", guarded(() => listen(model)));
  addEventListener("dragover", (event) => { event.preventDefault(); one("drop").classList.add("over"); });
  addEventListener("dragleave", () => one("drop").classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    one("drop").classList.remove("over");
    if (event.dataTransfer.files.length) hearFile(event.dataTransfer.files[0]);
  });
  tell("Ready");
} catch (error) {
  tell(`This page can't listen: ${error.message}`, true);
}
