// Shows the values of a chart under the pointer. The page reads the same without it.
"use strict";
for (const plot of document.querySelectorAll(".plot:not(.heat)")) {
  const { x, xUnit, unit, series } = JSON.parse(plot.querySelector("script").textContent);
  const cursor = plot.querySelector(".cursor"), output = plot.querySelector("output");
  const last = x[x.length - 1];
  const hide = () => { cursor.style.visibility = output.style.visibility = "hidden"; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    if (share < 0 || share > 1) { hide(); return; }
    const at = share * last;
    let low = 0, high = x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x[middle] > at) { high = middle; } else { low = middle; }
    }
    const near = at - x[low] < x[high] - at ? low : high;
    const known = series.filter((one) => one.y[near] !== null);
    const lines = known.map((one) => `${one.name}: ${one.y[near].toLocaleString("en")} ${unit}`);
    output.textContent = [`${x[near]} ${xUnit}`, ...lines].join("\n");
    const where = 1000 * x[near] / last;
    cursor.setAttribute("x1", where);
    cursor.setAttribute("x2", where);
    output.style.left = share < 0.5 ? `calc(${100 * share}% + 12px)` : "auto";
    output.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * share}% + 12px)`;
    cursor.style.visibility = output.style.visibility = "visible";
  });
}
