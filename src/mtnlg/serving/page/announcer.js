// Tells a screen reader what a stream says, sentence by sentence and not token by token.

const SENTENCE = /[\s\S]*[.!?。！？…\n]["'”’」』)）]*(?=\s|$|[\u3000-\u9fff])/;
const PAUSE_MS = 2500;

export class Announcer {
  constructor(place) {
    this.place = place;
    this.rest = "";
    this.last = 0;
  }

  say(text) {
    if (!text.trim()) return;
    this.place.textContent = text;
    this.last = performance.now();
  }

  /** Text that a stream released. */
  hear(text) {
    this.rest += text;
    if (performance.now() - this.last < PAUSE_MS) return;
    const sentences = SENTENCE.exec(this.rest)?.[0];
    if (!sentences) return;
    this.rest = this.rest.slice(sentences.length);
    this.say(sentences);
  }

  /** The stream is over: say what is left, and how it ended. */
  end(words) {
    this.say(`${this.rest} ${words}`);
    this.rest = "";
  }
}
