  // The controls of every page with a slider over depth; `show` draws what they say.
  function drive(root, show) {
    var slider = root.querySelector(".controls input"), timer = 0;
    var choice = root.querySelector(".controls select");
    var button = root.querySelector(".controls button");
    function stop() {
      clearInterval(timer);
      timer = 0;
      button.textContent = "Play";
      button.setAttribute("aria-pressed", "false");
    }
    function play() {
      if (slider.value === slider.max) { slider.value = 0; }
      button.textContent = "Pause";
      button.setAttribute("aria-pressed", "true");
      show();
      timer = setInterval(function () {
        slider.value = Number(slider.value) + 1;
        show();
        if (slider.value === slider.max) { stop(); }
      }, 600);
    }
    button.addEventListener("click", function () { if (timer) { stop(); } else { play(); } });
    slider.addEventListener("input", function () { stop(); show(); });
    choice.addEventListener("change", function () { stop(); show(); });
    show();
  }
  function move(mark, x, y) { mark.style.transform = "translate(" + x + "px," + y + "px)"; }
