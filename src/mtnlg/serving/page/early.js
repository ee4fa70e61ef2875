// Runs before anything is drawn, so that the page never flashes in the wrong theme or language.
{
  let settings = {};
  try {
    settings = JSON.parse(localStorage.getItem("mtnlg.settings") ?? "{}") ?? {};
  } catch {
    settings = {}; // storage is blocked or holds something else: the page works without
  }
  const root = document.documentElement;
  if (settings.theme === "light" || settings.theme === "dark") root.dataset.theme = settings.theme;
  const chinese = (navigator.language ?? "").toLowerCase().startsWith("zh");
  const language = settings.language === "zh" || settings.language === "en" ? settings.language : chinese ? "zh" : "en";
  root.lang = language === "zh" ? "zh-CN" : "en";
}
