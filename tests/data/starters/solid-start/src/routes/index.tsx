export default function Home() {
  return <h1>Hello Solid</h1>;
}
