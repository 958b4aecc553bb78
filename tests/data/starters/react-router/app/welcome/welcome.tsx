export function Welcome() {
  return <h1>What&apos;s next?</h1>;
}
