// The API's documentation: Swagger UI, with the same key as the chat page.
import { ask, askKey, keyHeaders } from "./api.js";

async function start() {
  let spec;
  try {
    spec = await (await ask("openapi.json")).json();
  } catch (error) {
    if (error.status === 401) askKey(document.getElementById("key-form"), start);
    else document.getElementById("alert").textContent = error.message;
    return;
  }
  if (!window.SwaggerUIBundle) {
    document.getElementById("alert").textContent =
      "Swagger UI is not installed on the server; run: pip install 'edgekd[serve]'";
    return;
  }
  window.SwaggerUIBundle({
    dom_id: "#swagger",
    spec,
    deepLinking: true,
    validatorUrl: null, // which is another host
    requestInterceptor: (request) => {
      Object.assign(request.headers, keyHeaders());
      return request;
    },
  });
}

start();
