// The report of a run that goes on: asks the server again and again, and replaces the report when there is news.
"use strict";

let version = "";

async function refresh() {
  let pause = 2000;
  try {
    const response = await fetch("report?since=" + encodeURIComponent(version), { cache: "no-store" });
    if (response.status === 200) {
      version = response.headers.get("X-Report-Version") || "";
      const page = new DOMParser().parseFromString(await response.text(), "text/html");
      const sliders = new Map([...document.querySelectorAll("input[data-run]")].map(
        (slider) => [slider.id, slider.value === slider.max ? null : slider.value]));
      document.querySelector("main").replaceWith(page.querySelector("main"));
      startReport();
      for (const slider of document.querySelectorAll("input[data-run]")) {
        const chosen = sliders.get(slider.id);
        if (chosen) { // what a person has chosen stays
          slider.value = chosen;
          slider.dispatchEvent(new Event("input"));
        }
      }
      setStatus("");
      if (response.headers.get("X-Run-Ended")) return;
    }
  } catch {
    setStatus("The run has ended, or its page cannot be reached any more. The last report is below.");
    pause = 10000;
  }
  setTimeout(refresh, pause);
}

function setStatus(words) {
  let status = document.getElementById("status");
  if (!status) {
    status = document.createElement("p");
    status.id = "status";
    status.className = "error";
    status.setAttribute("role", "status");
    document.body.prepend(status);
  }
  status.textContent = words;
}

setTimeout(refresh, 1000);
