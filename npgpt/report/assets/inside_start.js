// Draws the inside of a model from the data in the page.
"use strict";

showInside(document.getElementById("inside"), JSON.parse(document.getElementById("inside-data").textContent));
