// The report of a run: a slider shows the sample of each evaluation.
"use strict";

function startReport() {
  const element = document.getElementById("samples");
  const samples = element ? JSON.parse(element.textContent) : [];
  for (const slider of document.querySelectorAll("input[data-run]")) {
    const own = samples[Number(slider.dataset.run)];
    slider.addEventListener("input", () => {
      const [what, sample] = own[Number(slider.value)];
      document.querySelector(`output[for="${slider.id}"]`).textContent = what;
      document.getElementById(`${slider.id}-text`).textContent = sample;
    });
  }
}

startReport();
