/* Hands over what the microphone hears, in blocks of about 0.1 s, mono. */
registerProcessor("blocks", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(4096);
    this.filled = 0;
  }

  process([channels]) {
    if (!channels.length) return true;
    for (let index = 0; index < channels[0].length; index++) {
      let sum = 0;
      for (const channel of channels) sum += channel[index];
      this.block[this.filled++] = sum / channels.length;
      if (this.filled === this.block.length) {
        this.port.postMessage(this.block.slice());
        this.filled = 0;
      }
    }
    return true;
  }
});
