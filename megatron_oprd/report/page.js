"use strict";
// Values under the pointer, smoothing, and what a reader chose before the page of a running run loaded itself again.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const MOST_ROWS = 8; // lines of a tooltip

  const format = (value) => {
    if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
    return Math.abs(value) >= 1000
      ? value.toLocaleString("en-US", { maximumFractionDigits: 1 })
      : String(Number(value.toPrecision(4)));
  };

  const element = (name, attributes, parent) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    parent.append(made);
    return made;
  };

  const pixel = (value, [low, high], start, end) =>
    high === low ? (start + end) / 2 : start + ((value - low) / (high - low)) * (end - start);

  // The exponential mean of the values so far, without the bias of its start.
  const smoothed = (values, weight) => {
    let mean = 0, total = 0;
    return values.map((value) => {
      mean = weight * mean + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return mean / total;
    });
  };

  const nearest = (sorted, value) => {
    let low = 0, high = sorted.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < value) low = middle + 1; else high = middle;
    }
    return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
  };

  const tooltip = (figure) => {
    const box = document.createElement("div");
    box.className = "tooltip hidden";
    figure.append(box);
    return {
      hide: () => box.classList.add("hidden"),
      show: (rows, x, width) => {
        box.replaceChildren(...rows.map(([text, bold]) => {
          const line = document.createElement("div");
          line.append(bold ? Object.assign(document.createElement("b"), { textContent: text }) : text);
          return line;
        }));
        box.classList.remove("hidden");
        const room = figure.clientWidth - box.offsetWidth;
        const left = (x / width) * figure.clientWidth;
        box.style.left = `${Math.max(0, Math.min(room, left > figure.clientWidth / 2 ? left - box.offsetWidth - 12 : left + 12))}px`;
        box.style.top = "8px";
      },
    };
  };

  // Call `at` with the pointer's place in units of the picture, and `out` when it leaves.
  const follow = (svg, at, out) => {
    const box = svg.viewBox.baseVal;
    const place = (event) => {
      const area = svg.getBoundingClientRect();
      at(((event.clientX - area.left) / area.width) * box.width, ((event.clientY - area.top) / area.height) * box.height);
    };
    svg.addEventListener("pointermove", place);
    svg.addEventListener("pointerdown", place);
    svg.addEventListener("pointerleave", out);
  };

  const lineChart = (figure) => {
    const data = JSON.parse(figure.dataset.lines), svg = figure.querySelector("svg");
    const [left, right, top, bottom] = data.frame;
    const curves = [...svg.querySelectorAll(".series")];
    const lines = data.lines.map((line, place) => ({ ...line, x: line.x ?? data.lines[0].x, raw: line.y, curve: curves[place] }));
    const toX = (x) => pixel(x, data.x, left, right), toY = (y) => pixel(y, data.y, bottom, top);
    const cursor = element("line", { class: "cursor hidden", y1: top, y2: bottom }, svg);
    const dots = lines.map((line) => {
      const dot = element("circle", { r: 4, class: "hidden" }, svg);
      dot.style.fill = getComputedStyle(line.curve).stroke;
      return dot;
    });
    const box = tooltip(figure);
    const hide = () => { box.hide(); [cursor, ...dots].forEach((mark) => mark.classList.add("hidden")); };

    follow(svg, (px, py) => {
      const wanted = data.x[0] + ((px - left) / (right - left || 1)) * (data.x[1] - data.x[0]);
      const found = lines.map((line, place) => {
        const index = nearest(line.x, wanted);
        return { line, place, index, x: line.x[index], y: line.y[index] };
      });
      const x = found.reduce((best, one) => (Math.abs(one.x - wanted) < Math.abs(best - wanted) ? one.x : best), found[0].x);
      const here = found.filter((one) => Math.abs(toX(one.x) - toX(x)) < 4);
      const shown = [...here].sort((a, b) => Math.abs(toY(a.y) - py) - Math.abs(toY(b.y) - py)).slice(0, MOST_ROWS);
      hide();
      cursor.setAttribute("x1", toX(x)); cursor.setAttribute("x2", toX(x)); cursor.classList.remove("hidden");
      for (const one of shown) {
        dots[one.place].setAttribute("cx", toX(one.x)); dots[one.place].setAttribute("cy", toY(one.y));
        dots[one.place].classList.remove("hidden");
      }
      const rows = here.filter((one) => shown.includes(one)).map((one) => {
        const raw = one.line.raw === one.line.y ? "" : ` (exact ${format(one.line.raw[one.index])})`;
        return [`${one.line.name ? `${one.line.name}: ` : ""}${format(one.y)}${raw}`, false];
      });
      box.show([[`${data.x_label} ${format(x)}`, true], ...rows], toX(x), svg.viewBox.baseVal.width);
    }, hide);

    if (!data.smooth) return () => {};
    return (weight) => {
      for (const line of lines) {
        line.extra?.remove();
        line.extra = null;
        line.y = weight > 0 ? smoothed(line.raw, weight) : line.raw;
        line.curve.classList.toggle("faint", weight > 0);
        if (weight > 0) {
          line.extra = line.curve.cloneNode();
          line.extra.classList.remove("faint");
          line.extra.setAttribute("points", line.y.map((y, i) => `${toX(line.x[i]).toFixed(1)},${toY(y).toFixed(1)}`).join(" "));
          line.curve.after(line.extra);
        }
      }
    };
  };

  const heatMap = (figure) => {
    const data = JSON.parse(figure.dataset.cells), svg = figure.querySelector("svg");
    const [left, right, top, bottom] = data.frame, box = tooltip(figure);
    follow(svg, (px, py) => {
      const column = Math.floor(((px - left) / (right - left)) * data.columns.length);
      const row = Math.floor(((bottom - py) / (bottom - top)) * data.rows.length);
      const value = data.values[row]?.[column];
      if (value === undefined || value === null) return box.hide();
      const place = `${data.row_label} ${format(data.rows[row])}, ${data.column_label} ${format(data.columns[column])}`;
      box.show([[place, true], [format(value), false]], px, svg.viewBox.baseVal.width);
    }, box.hide);
  };

  const redraw = [...document.querySelectorAll("[data-lines]")].map(lineChart);
  document.querySelectorAll("[data-cells]").forEach(heatMap);

  const slider = document.querySelector("#smoothing"), axes = [...document.querySelectorAll("input[name=axis]")];
  const smooth = () => redraw.forEach((draw) => draw(Number(slider.value)));
  const chooseAxis = (axis) => document.querySelectorAll("[data-axis]").forEach((part) =>
    part.classList.toggle("hidden", part.dataset.axis !== axis));
  slider?.addEventListener("input", smooth);
  axes.forEach((input) => input.addEventListener("change", () => chooseAxis(input.value)));
  axes.filter((input) => input.checked).forEach((input) => chooseAxis(input.value));

  const key = `report ${location.pathname}`, blocks = [...document.querySelectorAll("details")];
  const title = (block) => block.querySelector("summary").textContent;
  addEventListener("pagehide", () => {
    try {
      const open = blocks.filter((block) => block.open).map(title);
      sessionStorage.setItem(key, JSON.stringify({ scroll: scrollY, smoothing: slider?.value, open }));
    } catch { /* a browser may forbid storage */ }
  });
  try {
    const kept = JSON.parse(sessionStorage.getItem(key));
    if (kept) {
      blocks.forEach((block) => { block.open = kept.open.includes(title(block)); });
      if (slider && kept.smoothing > 0) { slider.value = kept.smoothing; smooth(); }
      scrollTo(0, kept.scroll);
    }
  } catch { /* nothing is kept */ }
})();
