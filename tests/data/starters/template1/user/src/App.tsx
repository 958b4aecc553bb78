import { useEffect, useState } from "react";

export default function App() {
  const [status, setStatus] = useState("unknown");
  useEffect(() => {
    fetch("/api/health")
      .then((answer) => answer.json())
      .then((said) => setStatus(said.status));
  }, []);
  return (
    <main>
      <h1>Get started</h1>
      <p>API: {status}</p>
    </main>
  );
}
