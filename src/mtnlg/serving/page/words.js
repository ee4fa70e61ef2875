// Every word that the page says, in English and Chinese. {name} is filled in.

const WORDS = {
  skip: ["Skip to the message box", "跳到输入框"],
  conversations: ["Conversations", "对话列表"],
  newChat: ["New conversation", "新对话"],
  search: ["Search conversations", "搜索对话"],
  openList: ["Show conversations", "打开对话列表"],
  closeList: ["Hide conversations", "关闭对话列表"],
  importFile: ["Import conversations from a file", "从文件导入对话"],
  exportAll: ["Export all conversations to a file", "把全部对话导出为文件"],
  exportOne: ["Export “{title}”", "导出“{title}”"],
  rename: ["Rename “{title}”", "重命名“{title}”"],
  remove: ["Delete “{title}”", "删除“{title}”"],
  newTitle: ["New title", "新标题"],
  removed: ["Deleted “{title}”.", "已删除“{title}”。"],
  undo: ["Undo", "撤销"],
  imported: ["Imported: {count}", "已导入：{count}"],
  badFile: ["This file holds no conversations of this page.", "这个文件里没有本页的对话。"],
  noneFound: ["Nothing found", "没有找到"],
  mode: ["What the model does", "模式"],
  modeChat: ["Chat", "对话"],
  modeText: ["Continue text", "续写"],
  model: ["Model", "模型"],
  noModel: ["No model yet", "暂无模型"],
  settings: ["Settings", "设置"],
  messages: ["Messages", "消息"],
  toBottom: ["Scroll to the newest", "回到最新"],
  message: ["Message", "消息"],
  promptChat: ["Ask or say something…", "说点什么……"],
  promptText: ["Begin a text, the model goes on…", "写个开头，让模型接着写……"],
  promptMore: ["Add to the text, or send nothing to go on…", "接着写，或直接发送让模型继续……"],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  hint: ["Enter sends · Shift+Enter new line · Esc stops", "回车发送 · Shift+回车换行 · Esc 停止"],
  you: ["You", "你"],
  copy: ["Copy", "复制"],
  copied: ["Copied", "已复制"],
  copyCode: ["Copy code", "复制代码"],
  code: ["code", "代码"],
  again: ["Answer again", "重新回答"],
  edit: ["Edit", "编辑"],
  save: ["Send", "发送"],
  cancel: ["Cancel", "取消"],
  editMessage: ["Edit the message", "编辑消息"],
  branch: ["Version {at} of {count}", "第 {at} 个版本，共 {count} 个"],
  before: ["Version before", "上一个版本"],
  after: ["Version after", "下一个版本"],
  writing: ["The model is writing", "模型正在回答"],
  answered: ["Answer finished.", "回答完毕。"],
  stopped: ["Stopped", "已停止"],
  broken: ["Cut off", "已中断"],
  tokens: ["{count} tokens", "{count} 个词元"],
  rate: ["{rate} tokens/s", "{rate} 词元/秒"],
  first: ["first after {seconds} s", "首个 {seconds} 秒"],
  full: ["the limit of new tokens was reached", "达到新词元上限"],
  shortened: ["the oldest turns were left out", "已省去最早的几轮"],
  filtered: ["held back by a filter", "被过滤器拦下"],
  goOn: ["Go on", "继续"],
  welcomeChat: ["What shall we talk about?", "想聊点什么？"],
  welcomeText: ["Give it a beginning.", "给它一个开头。"],
  aboutChat: [
    "The model runs on this server. Conversations stay in this browser.",
    "模型在本服务器上运行，对话只保存在这个浏览器里。",
  ],
  aboutBase: [
    "This model was never trained to chat: it continues text. A persona's example lines make it answer; “Continue text” shows it as it is.",
    "这个模型没有受过对话训练，只会续写。对话时以人设的示例引导它回答；想看它的本来面目，请用“续写”。",
  ],
  starters: [
    "Write a short poem about the first snow\nExplain to a child why the sky is blue\nWrite a Python function that counts words",
    "写一首关于初雪的小诗\n向孩子解释天为什么是蓝的\n写一个统计词频的 Python 函数",
  ],
  beginnings: [
    "Once upon a time, by the sea,\nThe most important thing about time is\ndef count_words(text):",
    "春天的早晨，\n秋天的夜晚，星光闪烁，\n很久以前，山里有一座",
  ],
  // settings
  access: ["Access", "访问"],
  key: ["API key", "API 密钥"],
  keyHint: [
    "Kept in this browser only; sent to this server only. Empty if the server asks for none.",
    "只保存在这个浏览器，只发给本服务器。服务器不要求时留空。",
  ],
  show: ["Show", "显示"],
  voice: ["Instructions", "指令"],
  system: ["System prompt", "系统提示"],
  systemHint: ["What the model should be and do in this conversation.", "告诉模型在这段对话里扮演什么、怎么做。"],
  sampling: ["Sampling", "采样"],
  samplingHint: ["Empty: the server's default.", "留空即用服务器的默认值。"],
  reset: ["Back to defaults", "恢复默认"],
  temperature: ["Temperature", "温度"],
  temperatureHint: ["0 always takes the likeliest; higher is freer", "0 总取最可能的；越高越自由"],
  top_p: ["Top-p", "Top-p"],
  top_pHint: ["draw from the likeliest tokens of this total probability", "只从累计概率达到此值的词元中抽取"],
  top_k: ["Top-k", "Top-k"],
  top_kHint: ["draw from so many likeliest tokens", "只从最可能的若干个词元中抽取"],
  min_p: ["Min-p", "Min-p"],
  min_pHint: ["leave out what is less likely than this share of the likeliest", "舍去概率低于最高概率此比例的词元"],
  max_tokens: ["New tokens at most", "最多新词元"],
  repetition_penalty: ["Repetition penalty", "重复惩罚"],
  repetition_penaltyHint: ["over 1: less of what was said", "大于 1：少说重复的"],
  presence_penalty: ["Presence penalty", "出现惩罚"],
  frequency_penalty: ["Frequency penalty", "频率惩罚"],
  seed: ["Seed", "随机种子"],
  seedHint: ["a number repeats the same draws", "填数字则每次抽取相同"],
  stopStrings: ["Stop at (one per line)", "遇到即停（每行一个）"],
  overflow: ["When it is longer than the model can read", "超出模型长度时"],
  overflowRefuse: ["ask me", "先问我"],
  overflowDrop: ["leave out the oldest turns", "省去最早的几轮"],
  overflowSummarise: ["summarise the oldest turns", "把最早的几轮写成摘要"],
  looks: ["Display", "显示"],
  probabilities: ["Probabilities of tokens", "词元概率"],
  probabilitiesHint: [
    "Point at a token, or focus an answer and use the arrow keys, to see what else it could have been.",
    "指向某个词元，或聚焦回答后用方向键，查看其他可能。",
  ],
  tint: ["Tint unlikely tokens", "给低概率词元着色"],
  markdown: ["Format answers (Markdown)", "排版回答（Markdown）"],
  theme: ["Theme", "主题"],
  themeAuto: ["Theme: as the system", "主题：跟随系统"],
  themeLight: ["Theme: light", "主题：浅色"],
  themeDark: ["Theme: dark", "主题：深色"],
  switchLanguage: ["中文：用中文显示", "EN: show in English"],
  close: ["Close", "关闭"],
  // alternatives
  alternatives: ["Likeliest tokens here", "此处最可能的词元"],
  chosen: ["chosen", "选中"],
  walk: ["Arrow keys walk through its tokens", "用方向键逐个查看词元"],
  // errors
  errorKey: ["This server asks for an API key.", "服务器要求 API 密钥。"],
  errorBadKey: ["The server did not accept this API key.", "服务器不接受这个 API 密钥。"],
  errorForbidden: ["This key may not do that.", "这个密钥没有权限。"],
  errorBusy: ["Many are asking right now.", "现在请求较多。"],
  errorQuota: ["This key's limit is reached for now.", "这个密钥暂时达到了限额。"],
  errorStarting: ["The server is starting or pausing and will be back shortly.", "服务器正在启动或暂停，很快就好。"],
  errorGone: ["The server cannot be reached. Is it running, and is the network there?", "连不上服务器。它在运行吗？网络还在吗？"],
  errorCut: ["The answer broke off midway. What had arrived is kept.", "回答中途断开，已到的内容保留了。"],
  errorLong: ["This conversation is longer than the model can read.", "这段对话超出了模型能读的长度。"],
  errorModel: ["The server does not have this model any more.", "服务器上已没有这个模型。"],
  errorRequest: ["The server did not understand one of the settings.", "服务器不接受其中一项设置。"],
  errorServer: ["Something went wrong at the server.", "服务器出了点问题。"],
  nothing: ["the model ended at once", "模型一开口就结束了"],
  tryAgain: ["Try again", "再试一次"],
  againIn: ["Trying again in {seconds} s", "{seconds} 秒后重试"],
  wait: ["Do not wait", "不再等待"],
  enterKey: ["Enter a key", "填写密钥"],
  openSettings: ["Open settings", "打开设置"],
  dropOldest: ["Leave out the oldest turns", "省去最早的几轮"],
  startAnew: ["Start a new conversation", "开始新对话"],
  saidServer: ["The server says: {message}", "服务器说：{message}"],
  notKept: ["This browser lets the page keep nothing: conversations will be gone after a reload.", "浏览器不允许本页保存数据，刷新后对话会消失。"],
  // shortcuts
  shortcuts: ["Keyboard shortcuts", "键盘快捷键"],
  keyFocus: ["Go to the message box", "到输入框"],
  keyList: ["Go to the conversations", "到对话列表"],
  keyEditLast: ["Edit the last message (in an empty box)", "编辑上一条消息（输入框为空时）"],
  keyAgain: ["Answer again", "重新回答"],
  keyWalk: ["Walk through an answer's tokens", "逐个查看回答的词元"],
  enter: ["Enter", "回车"],
};

let language = "en";

export function setLanguage(value) {
  language = value;
}

export function getLanguage() {
  return language;
}

/** The words for `name` in the language chosen, with {placeholders} filled in. */
export function say(name, values = {}) {
  const pair = WORDS[name];
  if (!pair) throw new Error(`no words for ${name}`);
  return pair[language === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (_, key) => String(values[key] ?? ""));
}

/** Fill every element that names its words with them. */
export function fillWords(root) {
  for (const node of root.querySelectorAll("[data-words]")) node.textContent = say(node.dataset.words);
  for (const node of root.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", say(node.dataset.label));
    if (node.matches("button.icon")) node.title = say(node.dataset.label);
  }
  for (const node of root.querySelectorAll("[data-placeholder]")) node.placeholder = say(node.dataset.placeholder);
}

/** Whether a language prefers Chinese words. */
export function isChinese(tag) {
  return String(tag ?? "").toLowerCase().startsWith("zh");
}
